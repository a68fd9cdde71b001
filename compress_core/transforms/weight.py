"""Adds, finds, bypasses and removes weight transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress_core.errors import TransformError
from compress_core.transforms.chain import TransformChain, TransformContainer
from compress_core.transforms.generated import TRANSFORMS_ATTRIBUTE, base_class, transformed_class, update_class
from compress_core.transforms.stage import Stage
from compress_core.transforms.walk import modules_of
from compress_core.transforms.weight_chain import WeightChain


class WeightTransforms(TransformContainer, nn.ModuleDict):
    """The child `weight_transforms` of a transformed layer: a chain for each transformed parameter."""


@dataclass(frozen=True)
class WeightTransformHandle:
    """Returned by `add_weight_transform`, to remove the transform again.

    Attributes:
        name: The tensor's dotted name in `module`.
        key: The transform's name in the chain.
    """

    module: nn.Module
    name: str
    key: str

    def remove(self) -> None:
        """Removes the transform; removing the last one restores the layer's original class.

        Raises:
            TransformError: The transform has been removed before.
        """
        remove_weight_transform(self.module, self.name, self.key)


def add_weight_transform(
    module: nn.Module, name: str, transform: nn.Module, *, stage: Stage, key: str | None = None
) -> WeightTransformHandle:
    """Applies `transform` to a weight whenever a layer reads it.

    The parameter keeps its name, its optimizer state and its entry in `state_dict`. A tensor that several layers in
    `module` share gets one transform, which applies in all of them.

    It is computed each time the layer reads the weight, in eval mode too: however the weight was written to, layers
    compute with what is stored now.

    What else can be done with the transform (`recomputable`, how it follows when channels of the weight are removed) is
    declared by classes that derive from `WeightTransform`; other modules have no such capability.

    Args:
        module: The layer, or any module that contains it.
        name: The parameter's dotted name in `module`: `"weight"`, `"layer1.0.conv1.weight"`.
        transform: Maps the weight to one of the same shape. It becomes a child of the layer, so its parameters are
            trained and its buffers saved.
        stage: Its stage, which determines its position in the chain of this weight.
        key: Name of the transform in the chain and so in `state_dict`, unique for each tensor; by default its class
            name in lower case. Algorithms use their own name.

    Returns:
        A handle whose `remove()` undoes this.

    Raises:
        TransformError: There is no such parameter, it is already computed by something else (`parametrize`,
            `weight_norm`), or the key is taken or invalid.
    """
    key = type(transform).__name__.lower() if key is None else key
    if not key or "." in key:
        raise TransformError(
            f"a transform's key becomes part of names in state_dict: {key!r} must not be empty or dotted"
        )
    owner, parameter_name = resolve_parameter(module, name)
    chain = chain_of(owner, parameter_name)
    if chain is not None and key in chain._modules:
        raise TransformError(f"'{name}' already has a transform named '{key}'; remove it first, or choose another key")
    if chain is None:
        chain = WeightChain()
        chain.train(owner.training)
        places = _places_of(module, raw_parameter(owner, parameter_name))
        for place, _ in places:
            _check_name_is_free(place)
        for place, place_name in places:
            _attach_chain(place, place_name, chain)
    transform.train(owner.training)
    chain.add(key, transform, int(stage))
    return WeightTransformHandle(module, name, key)


def recompute_weights(model: nn.Module, on: bool = True) -> None:
    """Chooses whether transformed weights are kept for the backward pass or computed again there.

    Computing them again applies to convolutions and linear layers if all transforms of the weight are `recomputable`
    (see `WeightTransform`) and nothing else controls what is kept (checkpointing, `saved_tensors_hooks`, autocast,
    compilers). If the weight or a transform is changed in between, the backward pass raises an error.

    Args:
        model: The model, or any part of it.
        on: Whether to compute weights again; by default they are kept.
    """
    for module in model.modules():
        if isinstance(module, WeightChain):
            module.recompute = on


def remove_weight_transform(module: nn.Module, name: str, key: str) -> None:
    """Undoes `add_weight_transform`; see `WeightTransformHandle.remove`."""
    owner, parameter_name = resolve_parameter(module, name)
    chain = chain_of(owner, parameter_name)
    if chain is None or key not in chain._modules:
        raise TransformError(f"'{name}' has no transform named '{key}'")
    chain.discard(key)
    if not chain._modules:
        for place, place_name in _places_of(module, raw_parameter(owner, parameter_name)):
            if chain_of(place, place_name) is chain:
                detach_chain(place, place_name)


def get_weight_transform(module: nn.Module, name: str, key: str) -> nn.Module | None:
    """Returns the transform `key` of the parameter `name` (dotted) in `module`, or None.

    None as well if there is no such layer or parameter: the user may have replaced or removed it.
    """
    path, _, parameter_name = name.rpartition(".")
    try:
        chain = chain_of(module.get_submodule(path), parameter_name)
    except AttributeError:
        return None
    return None if chain is None else chain._modules.get(key)


def raw_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Returns the stored parameter `name` (dotted) in `module`, without transforms."""
    owner, parameter_name = resolve_parameter(module, name)
    return cast("nn.Parameter", owner._parameters[parameter_name])


def transformed_weight(module: nn.Module, name: str, before: Stage | None = None) -> torch.Tensor:
    """Returns a weight with its transforms applied, detached.

    Args:
        module: The model, or any module that contains the parameter.
        name: Dotted name of the parameter in `module`.
        before: Transforms of this stage and of later stages are not applied; by default all are applied.

    Raises:
        TransformError: There is no such parameter.
    """
    owner, parameter_name = resolve_parameter(module, name)
    chain = chain_of(owner, parameter_name)
    with torch.no_grad():
        value = raw_parameter(module, name).detach()
        return value if chain is None else chain.up_to(value, before)


def resolve_parameter(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the layer that owns the parameter `name` (dotted) and the parameter's name in it.

    Raises:
        TransformError: There is no such parameter, or it is not a plain one.
    """
    path, _, parameter_name = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError as error:
        raise TransformError(f"there is no module '{path}' below {type(module).__name__}") from error
    if owner._parameters.get(parameter_name) is None:
        raise TransformError(_why_not_plain(owner, parameter_name, name))
    return owner, parameter_name


def _why_not_plain(owner: nn.Module, parameter_name: str, name: str) -> str:
    if parametrize.is_parametrized(owner, parameter_name):
        return (
            f"'{name}' is computed by torch.nn.utils.parametrize; call fold_computed_weights(model) or "
            "parametrize.remove_parametrizations on the layer before it is compressed"
        )
    if parameter_name in owner.__dict__:
        return (
            f"'{name}' is recomputed by a hook (torch.nn.utils.weight_norm, spectral_norm or prune); remove that "
            "first (fold_computed_weights, remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    known = [key for key, value in owner._parameters.items() if value is not None]
    return f"there is no parameter '{name}'; {type(owner).__name__} has {known}"


def is_plain_parameter(module: nn.Module, name: str) -> bool:
    """Returns whether `module` stores the parameter `name`, instead of computing it by a hook or parametrization."""
    return module._parameters.get(name) is not None


def parameter_places(model: nn.Module) -> Mapping[int, list[tuple[str, nn.Module, str]]]:
    """Returns, for each `id(parameter)`, all its owners: (module's name, module, parameter's name).

    Shared modules and tied parameters appear once for each module object, in the order of `named_modules`.
    """
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module_name, module, name))
    return places


def _places_of(module: nn.Module, parameter: torch.Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (owner, name)
        for owner in modules_of(module)
        if not isinstance(owner, torch.jit.ScriptModule)
        for name, held in owner._parameters.items()
        if held is parameter
    ]


def transforms_of(owner: nn.Module) -> WeightTransforms | None:
    """Returns the container of a layer's chains, or None when the layer is not transformed."""
    if isinstance(owner, torch.jit.ScriptModule):  # its forward is compiled and cannot be changed
        return None
    child = owner._modules.get(TRANSFORMS_ATTRIBUTE)
    return child if isinstance(child, WeightTransforms) else None


def chain_of(owner: nn.Module, parameter_name: str) -> TransformChain | None:
    """Returns the chain of one parameter of a layer, or None."""
    container = transforms_of(owner)
    return None if container is None else cast("TransformChain | None", container._modules.get(parameter_name))


def _check_name_is_free(owner: nn.Module) -> None:
    if transforms_of(owner) is None and hasattr(owner, TRANSFORMS_ATTRIBUTE):
        raise TransformError(
            f"{type(owner).__name__} has an attribute '{TRANSFORMS_ATTRIBUTE}' of its own; rename it, compress-core "
            "keeps its transforms under that name"
        )


def _attach_chain(owner: nn.Module, parameter_name: str, chain: TransformChain) -> None:
    container = transforms_of(owner)
    if container is None:
        container = WeightTransforms()
        container.train(owner.training)
    # Fails before anything is changed if the class cannot be subclassed.
    transformed_class(base_class(owner), frozenset([*container.keys(), parameter_name]))
    if TRANSFORMS_ATTRIBUTE not in owner._modules:
        owner._modules[TRANSFORMS_ATTRIBUTE] = container
    container[parameter_name] = chain
    chain.places += 1
    update_class(owner)


def detach_chain(owner: nn.Module, parameter_name: str) -> None:
    """Removes the chain of one parameter from a layer; removing the last one restores the layer's original class."""
    container = cast("WeightTransforms", transforms_of(owner))
    cast("TransformChain", container[parameter_name]).places -= 1
    del container[parameter_name]
    if not container:
        del owner._modules[TRANSFORMS_ATTRIBUTE]
    update_class(owner)
