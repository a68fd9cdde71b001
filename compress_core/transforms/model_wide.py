"""Operations on all transforms of a model: find, bypass, swap, bake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compress_core.transforms.chain import TransformChain, TransformContainer
from compress_core.transforms.checkpoints import Awaited, mark_awaiting
from compress_core.transforms.weight import chain_of, detach_chain, parameter_places, raw_parameter


def has_transforms(model: nn.Module) -> bool:
    """Returns whether any module of `model` has weight or activation transforms."""
    return any(isinstance(module, TransformContainer) for module in model.modules())


def module_names(model: nn.Module) -> list[str]:
    """Returns the dotted names of a model's own modules, in order, without the model itself and without transforms.

    A module that is at several places has several names.
    """
    added = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, TransformContainer))
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return [name for name in names if not f"{name}.".startswith(added)]


def transforms_by_key(model: nn.Module) -> dict[int, tuple[str, str, nn.Module]]:
    """Returns every transform of a model: its id -> (dotted name of its place, key, the transform)."""
    return {
        id(transform): (name, key, transform)
        for name, chain in model.named_modules()
        if isinstance(chain, TransformChain)
        for key, transform in chain.named_children()
    }


def await_checkpoint(model: nn.Module) -> None:
    """Notes that a checkpoint has to bring the values of all transforms; the first forward says if it has not."""
    chains = [(name, module) for name, module in model.named_modules() if isinstance(module, TransformChain)]
    found = [(f"{name}.{key}", t) for name, chain in chains for key, t in chain.named_children() if t.state_dict()]
    mark_awaiting(transform for _, transform in found)
    awaited = Awaited(found)
    for _, chain in chains:
        chain.awaited = awaited


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: `model` is in eval mode, without autograd; restores the mode of each module on exit.

    The user's `train` is not called: it may do more, such as merge an adapter into its layer, which nobody would undo.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def bypass_transforms(model: nn.Module, kind: type[TransformChain] = TransformChain) -> Iterator[None]:
    """Within the context, `model` computes as if no transform had been added.

    Args:
        model: The model.
        kind: Which chains are bypassed; by default those of weights and those of activations.
    """
    chains = [module for module in model.modules() if isinstance(module, kind)]
    before = [chain.bypassed for chain in chains]
    try:
        for chain in chains:
            chain.bypassed = True
        yield
    finally:
        for chain, value in zip(chains, before, strict=True):
            chain.bypassed = value


@dataclass(frozen=True)
class TransformedWeight:
    """A weight with transforms.

    Attributes:
        parameter: The stored parameter.
        places: Each layer that has the weight, and the name of the weight in it.
        chain: The transforms as one module: its children, in order, by key.
    """

    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    chain: nn.Module

    def remove_transforms(self) -> None:
        """Removes all transforms of the weight; its layers then use the stored parameter."""
        for owner, name in self.places:
            detach_chain(owner, name)


def transformed_weights(model: nn.Module) -> list[TransformedWeight]:
    """Returns every weight of `model` that has transforms, tied ones once, in the order of `named_modules`."""
    found: list[TransformedWeight] = []
    for places in parameter_places(model).values():
        transformed = tuple((owner, name) for _, owner, name in places if chain_of(owner, name) is not None)
        if transformed:
            owner, name = transformed[0]
            chain = chain_of(owner, name)
            assert chain is not None
            found.append(TransformedWeight(raw_parameter(owner, name), transformed, chain))
    return found


def bake_transforms(model: nn.Module) -> None:
    """Writes each transformed weight to the stored parameter, and removes the weight transforms.

    Activation transforms cannot be baked, so they stay, and so do the generated classes of their modules. The outputs
    of the model in eval mode stay the same, bit for bit.
    """
    for weight in transformed_weights(model):
        weight.chain.eval()
        with torch.no_grad():
            weight.parameter.copy_(weight.chain(weight.parameter))
        weight.remove_transforms()


@contextlib.contextmanager
def swapped_transform_buffers(model: nn.Module) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Context manager that saves the transforms' buffers (masks), to return to the present model for a while.

    Yields:
        A function that returns a context manager in which the transforms have the saved buffers.

    An exception within the outer context restores the saved buffers permanently.
    """
    helpers = [module for module in model.modules() if isinstance(module, TransformChain)]
    owners = {id(module): module for chain in helpers for module in chain.modules()}
    saved = [
        (module, name, buffer.clone())
        for module in owners.values()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    @contextlib.contextmanager
    def as_before() -> Iterator[None]:
        current = [(module, name, module._buffers[name]) for module, name, _ in saved]
        try:
            for module, name, values in saved:
                module._buffers[name] = values
            yield
        finally:
            for module, name, buffer in current:
                module._buffers[name] = buffer

    try:
        yield as_before
    except BaseException:
        for module, name, values in saved:
            module._buffers[name] = values
        raise
