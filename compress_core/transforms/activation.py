"""Adds, finds and removes activation transforms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.transforms.activation_forward import ActivationTransforms
from compress_core.transforms.activation_functions import COMPUTABLE_ACTIVATIONS, activation_called
from compress_core.transforms.call_sites import functions_named
from compress_core.transforms.chain import TransformChain, computed_activation
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, base_class, transformed_class, update_class
from compress_core.transforms.places import ActivationPlace, CallInput, CallOutput, ModuleOutput
from compress_core.transforms.stage import Stage
from compress_core.transforms.walk import modules_of
from compress_core.transforms.wrapped_forward import drop_plain_forward, is_mixed_precision


@dataclass(frozen=True)
class ActivationTransformHandle:
    """One transform at one place, with methods to remove or replace it.

    Attributes:
        place: Its place in the model.
        key: Its name at this place.
        transform: The transform.
        stage: Its stage, which determines its position in the chain of this place.
    """

    place: ActivationPlace
    key: str
    transform: nn.Module
    stage: Stage
    _model: nn.Module = field(repr=False)

    def remove(self) -> None:
        """Removes the transform from this place; removing the last one restores the module's original class.

        Raises:
            TransformError: The transform has been removed before.
        """
        container, name = self._found()
        container.chain(name).discard(self.key)
        if not container.chain(name)._modules:
            del container._modules[name], container.places[name]
            container.make_plan()
        _drop_empty(self._model)

    def substitute(self, transform: nn.Module) -> ActivationTransformHandle:
        """Replaces this transform by another one, under the same key, and returns the handle of the new one.

        Args:
            transform: The new transform; see `add_activation_transform`.

        Raises:
            TransformError: This transform has been removed before, or the new one cannot be at this place.
        """
        container, name = self._found()
        _check_computing(self.place, transform, [t for k, t in container.chain(name)._modules.items() if k != self.key])
        container.chain(name).replace(self.key, transform)
        return replace(self, transform=transform)

    def _found(self) -> tuple[ActivationTransforms, str]:
        """Returns the container that holds the transform, and the name of its chain there."""
        container = activations_of(_owner(self._model, self.place))
        name = None if container is None else container.chain_name(_stored(container, self.place))
        if container is None or name is None or container.chain(name)._modules.get(self.key) is not self.transform:
            raise TransformError(f"'{self.place}' has no transform named '{self.key}'")
        return container, name


def add_activation_transform(
    model: nn.Module, place: ActivationPlace, transform: nn.Module, *, stage: Stage, key: str | None = None
) -> ActivationTransformHandle:
    """Applies `transform` to an activation in every forward.

    One transform may be added at several places, which then share its parameters.

    Args:
        model: The model in which `place` was found, or the module to which `place.module` is relative.
        place: Identifies the tensor.
        transform: Maps the tensor to one of the same shape. Its parameters are trained, its buffers are saved with the
            module of the place. It must return a new tensor or its argument itself (not a view of it). Its backward
            must not need the returned tensor, because the next operation may write to it in place. Classes that derive
            from `ActivationTransform` declare further capabilities: to compute the preceding activation function as
            well, to stand in its place, to overwrite a tensor that has no other reader, to follow when channels are
            removed.
        stage: Its stage, which determines its position in the chain of this place.
        key: Its name in the chain and so in `state_dict`, unique at each place; by default its class name in lower
            case. Algorithms use their own name.

    Returns:
        A handle whose `remove()` undoes this.

    Raises:
        TransformError: There is no such module or function, the forward of the module cannot be changed, the key is
            taken or invalid, or the transform computes an activation function that is not at this place, or that
            another transform computes. Nothing has been changed.
    """
    key = type(transform).__name__.lower() if key is None else key
    if not key or "." in key:
        raise TransformError(
            f"a transform's key becomes part of names in state_dict: {key!r} must not be empty or dotted"
        )
    owner = _owner(model, place)
    # These use their submodules in ways of their own.
    special = [m for m in modules_of(model) if isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoder))]
    _check_reachable(model, owner, place, special)
    if isinstance(place, CallInput | CallOutput):
        functions_named(place.function)
    transformed_class(base_class(owner), frozenset(), activations=True)  # fails before anything is changed
    container = activations_of(owner)
    name = None if container is None else container.chain_name(_stored(container, place))
    if container is not None and name is not None and key in container.chain(name)._modules:
        raise TransformError(f"'{place}' already has a transform named '{key}'; remove it first, or choose another key")
    _check_computing(place, transform, () if name is None or container is None else container.chain(name).children())
    container = _attach(owner)
    if name is None:
        name = _free_name(container, place)
        container.add_module(name, TransformChain().train(owner.training))
        container.places[name] = place
    transform.train(owner.training)
    container.chain(name).add(key, transform, int(stage))
    container.make_plan()
    for module in special:
        if isinstance(module, nn.TransformerEncoder) and owner in set(module.modules()):
            _attach(module)
    return ActivationTransformHandle(place, key, transform, stage, model)


def activation_transforms(model: nn.Module) -> list[ActivationTransformHandle]:
    """Returns every activation transform of `model`, in the order of its modules."""
    return [
        ActivationTransformHandle(
            replace(place, module=module_name),
            key,
            cast("nn.Module", transform),
            Stage(container.chain(name).stage_of(key)),
            model,
        )
        for module_name, container in _containers(model)
        for name, place in container.places.items()
        for key, transform in container.chain(name)._modules.items()
    ]


def check_forwards(model: nn.Module) -> None:
    """Refuses to make a model plain where a wrapper has taken hold of the forward that applies its transforms.

    Raises:
        TransformError: A module with activation transforms has a forward of its own as an attribute.
    """
    for name, module in model.named_modules():
        if activations_of(module) is not None:
            _check_forward(module, f"'{name or 'model'}' ({type(module).__name__})")


def get_activation_transform(model: nn.Module, place: ActivationPlace, key: str) -> nn.Module | None:
    """Returns the transform `key` at `place`, or None; None as well if there is no such module any more."""
    try:
        container = activations_of(model.get_submodule(place.module))
    except AttributeError:
        return None
    name = None if container is None else container.chain_name(_stored(container, place))
    return None if container is None or name is None else container.chain(name)._modules.get(key)


def strip_activation_transforms(model: nn.Module) -> None:
    """Removes every activation transform of `model`, which then computes with untransformed activations."""
    for _, module in list(model.named_modules()):
        if activations_of(module) is not None:
            del module.__dict__[ACTIVATIONS_ATTRIBUTE]
            update_class(module)


def activations_of(module: nn.Module) -> ActivationTransforms | None:
    """Returns the container of a module's activation transforms, or None."""
    if isinstance(module, torch.jit.ScriptModule):  # compiled elsewhere, out of reach
        return None
    found = module.__dict__.get(ACTIVATIONS_ATTRIBUTE)
    return found if isinstance(found, ActivationTransforms) else None


def _containers(model: nn.Module) -> Iterator[tuple[str, ActivationTransforms]]:
    for name, module in list(model.named_modules()):
        if (container := activations_of(module)) is not None:
            yield name, container


def _stored(container: ActivationTransforms, place: ActivationPlace) -> ActivationPlace:
    """Returns the place with the module name that the container uses; a shared module has several names."""
    return next((p for p in container.places.values() if replace(p, module=place.module) == place), place)


def _owner(model: nn.Module, place: ActivationPlace) -> nn.Module:
    try:
        return model.get_submodule(place.module)
    except AttributeError as error:
        raise TransformError(f"there is no module '{place.module}' below {type(model).__name__}") from error


def _check_reachable(model: nn.Module, owner: nn.Module, place: ActivationPlace, special: Iterable[nn.Module]) -> None:
    what = f"'{place.module or 'model'}' ({type(owner).__name__})"
    if isinstance(owner, torch.jit.ScriptModule):
        raise TransformError(f"{what} is a ScriptModule, whose forward cannot be changed; compress it before scripting")
    _check_forward(owner, what)
    if type(owner).forward is nn.Module.forward:
        raise TransformError(f"{what} has no forward: it only holds other modules; name one of these")
    for module in special:
        if isinstance(module, nn.MultiheadAttention) and owner is module.out_proj:
            name = next(name for name, other in model.named_modules() if other is module)
            raise TransformError(
                f"{what} is never called: '{name}' uses its weight directly; transform '{name}' instead"
            )
    taken = activations_of(owner) is None and hasattr(owner, ACTIVATIONS_ATTRIBUTE)
    if taken:
        raise TransformError(
            f"{what} has an attribute '{ACTIVATIONS_ATTRIBUTE}' of its own; rename it, compress-core keeps its "
            "transforms under that name"
        )


def _check_forward(owner: nn.Module, what: str) -> None:
    drop_plain_forward(owner)
    if "forward" in owner.__dict__:
        remedy = (
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes accelerate's mixed precision off; compress "
            "the model before accelerator.prepare"
            if is_mixed_precision(owner)
            else "remove it before compression (accelerate: remove_hook_from_module) and set it again afterwards"
        )
        raise TransformError(
            f"{what} has a forward of its own as an attribute (accelerate and others set one), which would bypass "
            f"transforms; {remedy}"
        )


def _check_computing(place: ActivationPlace, transform: nn.Module, others: Iterable[nn.Module | None]) -> None:
    activation = computed_activation(transform)
    if not activation:
        return
    what = f"'{place}': {type(transform).__name__} computes the activation function '{activation}' itself"
    if activation not in COMPUTABLE_ACTIVATIONS:
        raise TransformError(f"{what}, and a transform can do that for {', '.join(sorted(COMPUTABLE_ACTIVATIONS))}")
    if not isinstance(place, CallOutput) or place.item or activation_called(place.function) != activation:
        raise TransformError(f"{what}, so its place is the CallOutput of that function")
    if any(computed_activation(other) for other in others):
        raise TransformError(f"{what}, and so does another transform there; remove that one first")


def _attach(owner: nn.Module) -> ActivationTransforms:
    container = activations_of(owner)
    if container is None:
        container = ActivationTransforms(base_class(owner))
        container.train(owner.training)
        owner.__dict__[ACTIVATIONS_ATTRIBUTE] = container
        update_class(owner)
    return container


def _drop_empty(model: nn.Module) -> None:
    """Removes containers without places; those of encoders only when nothing below them is transformed any more."""
    for _, module in list(model.named_modules()):
        container = activations_of(module)
        if container is None or container.places:
            continue
        below = any(bool(other.places) for _, other in _containers(module))
        if not below or not isinstance(module, nn.TransformerEncoder):
            del module.__dict__[ACTIVATIONS_ATTRIBUTE]
            update_class(module)


def _free_name(container: ActivationTransforms, place: ActivationPlace) -> str:
    """Returns a name for `state_dict` that describes the place and is the same in every run."""
    path = place.item if isinstance(place, ModuleOutput | CallOutput) else place.argument
    parts = ["output" if isinstance(place, ModuleOutput | CallOutput) else "input", *map(str, path)]
    if isinstance(place, CallInput | CallOutput):
        parts = [*place.function.split("."), str(place.calls.site), *parts]
    name = "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)
    while name in container._modules or hasattr(container, name):
        name += "_"
    return name
