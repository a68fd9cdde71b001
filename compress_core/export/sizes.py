"""Sizes that vary: reads the user's `dynamic_shapes`, which names dimensions of the model's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress_core.errors import UsageError
from compress_core.export.inputs import BATCH, Inputs, Varying
from compress_core.torch_internals import tree_map

# An example: {"pixels": {2: "height", 3: "width"}}, or [(None, None, "height", "width")].
DynamicShapes = Mapping[str, Any] | Sequence[Any]
_OPTION = "dynamic_shapes"


def with_varying_sizes(
    inputs: Inputs, model: nn.Module, shapes: DynamicShapes | None, input_names: Sequence[str] | None
) -> Inputs:
    """Returns inputs that know which of their dimensions vary.

    Args:
        inputs: The arguments of the model's forward.
        model: The model.
        shapes: What the user has named; see `CompressionController.export`.
        input_names: Names of the inputs in the file, in order, which may be used as well as those of arguments.

    Raises:
        UsageError: There is no such input or dimension, an argument is no tensor, or a name stands for two sizes.
    """
    if shapes is None:
        return inputs
    places: dict[str, list[tuple[int, int]]] = {}
    for number, dim, name in _named(inputs, model, shapes, input_names):
        places.setdefault(name, []).append((number, dim))
    varying = tuple(Varying(name, tuple(found)) for name, found in places.items())
    for entry in varying:
        _check_equal(inputs, entry)
    has_batch = any(entry.name == BATCH or any(dim == 0 for _, dim in entry.places) for entry in varying)
    return replace(inputs, varying=varying, batch_size=0 if has_batch else inputs.batch_size)


def _named(
    inputs: Inputs, model: nn.Module, shapes: DynamicShapes, input_names: Sequence[str] | None
) -> Iterator[tuple[int, int, str]]:
    """Yields (number of the tensor, dimension, name)."""
    numbers = iter(range(len(inputs.tensors)))
    args, kwargs = tree_map(
        lambda leaf: _Tensor(next(numbers), leaf) if isinstance(leaf, torch.Tensor) else leaf,
        (inputs.args, inputs.kwargs),
    )
    arguments = _arguments(model, args, kwargs)
    if isinstance(shapes, Mapping):
        tensors = list(_tensors([*args, *kwargs.values()]))
        own = dict(zip(input_names or (), tensors, strict=False))
        for key, named in shapes.items():
            if key not in arguments and key not in own:
                known = dict.fromkeys([*own, *arguments])
                raise UsageError(f"{_OPTION}: the model has no input {key!r}; it has {', '.join(known)}")
            yield from _walked(own.get(key, arguments.get(key)), named, f"{_OPTION}[{key!r}]")
    elif isinstance(shapes, Sequence) and not isinstance(shapes, str):
        if len(shapes) > len(arguments):
            names = ", ".join(arguments)
            raise UsageError(f"{_OPTION}: {len(shapes)} entries for {len(arguments)} arguments ({names})")
        for number, (value, entry) in enumerate(zip(arguments.values(), shapes, strict=False)):
            yield from _walked(value, entry, f"{_OPTION}[{number}]")
    else:
        raise UsageError(
            f"{_OPTION}: {shapes!r} must be a dict such as {{'input': {{1: 'length'}}}}, or a list with an entry for "
            "each argument"
        )


class _Tensor:
    """A tensor among the arguments, as torch's trees do not look into it.

    Attributes:
        number: Its number among the tensors.
        shape: Its shape.
    """

    def __init__(self, number: int, tensor: torch.Tensor) -> None:
        self.number, self.shape = number, tuple(tensor.shape)


def _tensors(value: Any) -> Iterator[_Tensor]:
    found: list[_Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, _Tensor) else None, value)
    yield from sorted(found, key=lambda tensor: tensor.number)


def _arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments by their names in forward; those of `*args` are numbered."""
    named: dict[str, Any] = {}
    parameters = list(inspect.signature(model.forward).parameters.values())
    several = next((entry.name for entry in parameters if entry.kind is entry.VAR_POSITIONAL), "args")
    positional = [
        entry.name for entry in parameters if entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)
    ]
    for number, value in enumerate(args):
        name = positional[number] if number < len(positional) else f"{several}_{number - len(positional)}"
        named[name] = value
    return {**named, **kwargs}


def _walked(value: Any, entry: Any, place: str) -> Iterator[tuple[int, int, str]]:
    if entry is None:
        return
    if isinstance(value, _Tensor):
        yield from _dimensions(value, entry, place)
        return
    parts: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    if parts is None:
        raise UsageError(
            f"{place}: the argument is {value!r:.60} ({type(value).__name__}), and only tensors have sizes"
        )
    wanted = dict(enumerate(entry)) if isinstance(entry, (list, tuple)) else entry
    if not isinstance(wanted, Mapping):
        raise UsageError(
            f"{place}: {entry!r:.60} must be a dict or a list, as the argument is a {type(value).__name__}"
        )
    for key, part in wanted.items():
        if key not in parts:
            raise UsageError(f"{place}: the argument has no {key!r}; it has {', '.join(map(repr, parts))}")
        yield from _walked(parts[key], part, f"{place}[{key!r}]")


def _dimensions(tensor: _Tensor, entry: Any, place: str) -> Iterator[tuple[int, int, str]]:
    ndim = len(tensor.shape)
    if isinstance(entry, (list, tuple)):
        if len(entry) != ndim:
            raise UsageError(f"{place}: {len(entry)} entries for the {ndim} dimensions of a tensor {tensor.shape}")
        entry = dict(enumerate(entry))
    if not isinstance(entry, Mapping):
        raise UsageError(f"{place}: {entry!r:.60} must be a dict such as {{1: 'length'}}, from dimensions to names")
    for dim, name in entry.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or not -ndim <= dim < ndim:
            there = f"0 to {ndim - 1}" if ndim else "none"
            raise UsageError(f"{place}: {dim!r} is no dimension of a tensor of shape {tensor.shape}; there are {there}")
        if name is None:
            continue
        if not isinstance(name, str) or not name:
            raise UsageError(f"{place}[{dim}]: {name!r} is no name; give the size a name, such as 'length', or None")
        if not tensor.shape[dim]:
            raise UsageError(f"{place}[{dim}]: the size is 0 in the example; pass args with one or more")
        yield tensor.number, dim % ndim, name


def _check_equal(inputs: Inputs, entry: Varying) -> None:
    sizes = [inputs.tensors[number].shape[dim] for number, dim in entry.places]
    if len(set(sizes)) > 1:
        found = ", ".join(
            f"{size} (tensor {number}, dimension {dim})"
            for size, (number, dim) in zip(sizes, entry.places, strict=True)
        )
        raise UsageError(f"{_OPTION}: {entry.name!r} stands for different sizes: {found}; give each a name of its own")
