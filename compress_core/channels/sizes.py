"""Finds the integer attributes in which modules of unknown classes keep the number of their channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from compress_core.channels.groups import ChannelGroup
from compress_core.channels.shrinking import keeps_sizes
from compress_core.transforms.base import ActivationTransform, WeightTransform


def with_sizes(model: nn.Module, group: ChannelGroup, failing: str = "") -> ChannelGroup:
    """Returns a group with the integer attributes that hold the size of a dimension of its channels.

    They are looked for in the layers that own the group's tensors, and in the module where a forward with fewer
    channels fails. Layers of classes that torch has are left out, since their attributes are known, and so are
    attributes whose value is the size of another dimension of the layer as well.

    Args:
        model: The model.
        group: The group.
        failing: Dotted name of the module where a forward fails.
    """
    inside = {(m.parameter, m.dim): len(m.channels) for m in group.members if (m.channels >= 0).all()}
    pairs: dict[tuple[str, str], None] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in inside):
        own = {size for (name, _), size in inside.items() if name.rpartition(".")[0] == path}
        others = {size for place, size in _sizes(model, path).items() if place not in inside}
        pairs |= dict.fromkeys(_attributes(model, path, own - others))
    if not _sizes(model, failing):
        pairs |= dict.fromkeys(_attributes(model, failing, set(inside.values())))
    return replace(group, attributes=tuple(dict.fromkeys([*group.attributes, *pairs])))


def sized_alike(model: nn.Module, group: ChannelGroup, example: ChannelGroup) -> ChannelGroup:
    """Returns a group with its sizes if it has an attribute of a class whose attribute the example needed."""
    sized = with_sizes(model, group)
    needed = {(type(model.get_submodule(path)), attribute) for path, attribute in example.attributes}
    alike = any((type(model.get_submodule(path)), attribute) in needed for path, attribute in sized.attributes)
    return sized if alike else group


def _sizes(model: nn.Module, path: str) -> dict[tuple[str, int], int]:
    """Returns the size of each dimension of the tensors that a module itself has."""
    module, prefix = model.get_submodule(path), f"{path}." if path else ""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {(prefix + name, dim): size for name, tensor in own for dim, size in enumerate(tensor.shape)}


def _attributes(model: nn.Module, path: str, sizes: set[int]) -> Iterator[tuple[str, str]]:
    module = model.get_submodule(path)
    if not keeps_sizes(module) and not isinstance(module, (WeightTransform, ActivationTransform)):
        for name, value in vars(module).items():
            if type(value) is int and value in sizes:
                yield path, name
