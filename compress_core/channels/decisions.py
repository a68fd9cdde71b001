"""Freezes decisions that transforms make over a whole weight, such as the top-k of scores, before the weight is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compress_core.channels.errors import ShrinkError
from compress_core.data.rng import preserved_rng
from compress_core.transforms import WeightTransform
from compress_core.transforms.chain import TransformChain
from compress_core.transforms.weight import chain_of, parameter_places

# Freezing a decision must not change values; the tolerance is for transforms that compute them in another order.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class TransformedWeight:
    """A parameter with weight transforms.

    Attributes:
        name: Its dotted name.
        module: Name of the layer that owns it, the first one if the weight is tied.
        owner: That layer.
        parameter: The stored parameter.
        chain: Its transforms.
    """

    name: str
    module: str
    owner: nn.Module
    parameter: torch.Tensor
    chain: TransformChain


def transformed_weights(model: nn.Module) -> Iterator[TransformedWeight]:
    """Yields every parameter of a model that has weight transforms, once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, places in parameter_places(model).items():
        module, owner, own_name = places[0]
        chain, parameter = chain_of(owner, own_name), owner._parameters[own_name]
        if chain is not None and parameter is not None:
            yield TransformedWeight(names[key], module, owner, parameter, chain)


def undecided(chain: TransformChain) -> list[str]:
    """Returns the keys of the transforms whose result depends on the whole tensor."""
    return [key for key, transform in chain.named_children() if _is_undecided(transform)]


def tensors_to_come(model: nn.Module, weights: Collection[str]) -> tuple[str, ...]:
    """Returns the prefixes of the names of tensors that freezing decisions on these weights may add or remove."""
    chains = [weight.chain for weight in transformed_weights(model) if weight.name in weights]
    found = {id(transform) for chain in chains for transform in chain.children() if _is_undecided(transform)}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in found)


def freeze_decisions(model: nn.Module, weights: Collection[str]) -> bool:
    """Freezes the decisions over whole weights for these weights; returns whether there were any.

    Raises:
        ShrinkError: A transform cannot freeze its decision, or computes something else afterwards. Decisions of
            transforms before it have been frozen.
    """
    found = [weight for weight in transformed_weights(model) if weight.name in weights and undecided(weight.chain)]
    for weight in found:
        freeze_chain(weight.chain, weight)
    return bool(found)


def freeze_chain(chain: TransformChain, weight: TransformedWeight) -> None:
    """Freezes the decisions in the transform chain of a weight, or in a copy of the chain.

    Raises:
        ShrinkError: A transform cannot freeze its decision, or computes something else afterwards.
    """
    with preserved_rng(), torch.no_grad(), _evaluated(chain):
        tensor = weight.parameter.detach()
        for key, transform in chain.named_children():
            result = transform(tensor)
            if isinstance(transform, WeightTransform) and transform.depends_on_whole_tensor:
                _freeze(transform, tensor, key, weight)
                _check_same(result, transform(tensor), key, weight)
            tensor = result


def _freeze(transform: WeightTransform, tensor: torch.Tensor, key: str, weight: TransformedWeight) -> None:
    what = f"the transform '{key}' ({type(transform).__name__}) of '{weight.name}'"
    try:
        transform.freeze_decision(tensor)
    except NotImplementedError as error:
        raise ShrinkError(
            f"{what} depends on the whole tensor, and would compute something else when channels of the weight are "
            f"removed ({error}); implement freeze_decision, or keep the layer from being pruned by ignored_scopes",
            weight.module,
        ) from error
    if transform.depends_on_whole_tensor:
        raise ShrinkError(
            f"{what} still depends on the whole tensor after freeze_decision, which has to set "
            "depends_on_whole_tensor = False on the transform",
            weight.module,
        )


def _check_same(before: torch.Tensor, after: torch.Tensor, key: str, weight: TransformedWeight) -> None:
    scale = float(before.abs().max()) or 1.0
    difference = float((before.double() - after.double()).abs().max()) / scale
    if not difference <= _TOLERANCE:
        raise ShrinkError(
            f"the transform '{key}' of '{weight.name}' computes something else after freeze_decision: a relative "
            f"difference of {difference:.2g}; it has to keep what it decided for the weight that it is given",
            weight.module,
        )


def _is_undecided(transform: nn.Module) -> bool:
    return isinstance(transform, WeightTransform) and transform.depends_on_whole_tensor


@contextlib.contextmanager
def _evaluated(chain: TransformChain) -> Iterator[None]:
    modes = [(module, module.training) for module in chain.modules()]
    chain.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
