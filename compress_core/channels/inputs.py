"""The inputs on which a smaller model is compared: those of the example where there are any, else random ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from compress_core.data.memory import refuse_out_of_memory
from compress_core.saved import STRICT, Items, Whole, damaged, parsed, shown
from compress_core.trace import Example
from compress_core.trace.graph import ForwardTrace, inputs_with_paths

logger = logging.getLogger(__name__)

_SEED = 20
# Of images, few samples show as much as many, and the plan keeps them for as long as the model is compressed.
_MOST_SAMPLES = 2
# Larger tensors are not saved with the plan, and are random after resuming.
_LARGEST_SAVED = 4096


# Saved shapes beyond these are refused, because random tensors are made of them later.
_LARGEST_INPUT = 1 << 31
_LAST_ARGUMENT = 1000
_DEEPEST_ARGUMENT = 16


class _SavedValues(BaseModel):
    model_config = STRICT
    shape: Items[Whole]
    flat: Items[bool | int | float]


class _SavedInput(BaseModel):
    model_config = STRICT
    path: Items[Whole | str]
    shape: Items[Whole]
    dtype: str
    values: _SavedValues | None = None


@dataclass(frozen=True)
class InputSpec:
    """An input tensor of a forward.

    Attributes:
        path: Its position among the arguments: an index or a keyword, then keys into nested containers.
        shape: Its shape.
        dtype: Its dtype, as `float32`.
        values: Values that the model can be run on, of this shape or of fewer samples; None for random ones. Where
            values have a meaning (offsets, boxes, tokens, masks), random ones are none that the model is made for.
    """

    path: tuple[int | str, ...]
    shape: tuple[int, ...]
    dtype: str
    values: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        saved = {"path": list(self.path), "shape": list(self.shape), "dtype": self.dtype}
        if self.values is not None and self.values.numel() <= _LARGEST_SAVED and bool(self.values.isfinite().all()):
            saved["values"] = {"shape": list(self.values.shape), "flat": self.values.flatten().tolist()}
        return saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], path: str = "input") -> InputSpec:
        """Restores an object from what `to_dict` returned.

        Args:
            saved: The dict.
            path: Where it is, for messages.

        Raises:
            StateError: `saved` was not returned by `to_dict`.
        """
        found = parsed(_SavedInput, saved, path)
        if not 0 < len(found.path) <= _DEEPEST_ARGUMENT or any(
            isinstance(key, int) and key > _LAST_ARGUMENT for key in found.path
        ):
            raise damaged(
                f"{path}.path", f"must be 1 to {_DEEPEST_ARGUMENT} positions up to {_LAST_ARGUMENT}, or keywords"
            )
        if math.prod(found.shape) > _LARGEST_INPUT:
            raise damaged(f"{path}.shape", f"has more than {_LARGEST_INPUT} elements, got {found.shape[:8]}")
        kind = getattr(torch, found.dtype, None)
        if not isinstance(kind, torch.dtype):
            raise damaged(f"{path}.dtype", f"must be a dtype of torch, got {shown(found.dtype)}")
        values = None
        if (entry := found.values) is not None:
            if math.prod(entry.shape) != len(entry.flat) or len(entry.flat) > _LARGEST_SAVED:
                raise damaged(f"{path}.values.flat", f"holds {len(entry.flat)} values for the shape {entry.shape[:8]}")
            fits = len(entry.shape) == len(found.shape) and len(entry.flat) > 0
            if not fits or list(entry.shape[1:]) != list(found.shape[1:]):
                raise damaged(f"{path}.values.shape", f"does not fit the shape {found.shape}, got {entry.shape[:8]}")
            whole = not (kind.is_floating_point or kind.is_complex)
            if whole and any(isinstance(value, float) for value in entry.flat):
                raise damaged(f"{path}.values.flat", f"holds fractions, and the dtype is {found.dtype}")
            try:
                values = torch.tensor(entry.flat, dtype=kind).reshape(entry.shape)
            except (RuntimeError, TypeError, ValueError) as error:
                raise damaged(f"{path}.values.flat", f"holds values that are no {found.dtype} ({error})") from error
        return cls(tuple(found.path), tuple(found.shape), found.dtype, values)


def input_specs(
    forward: ForwardTrace, model: nn.Module | None = None, example: Example | None = None
) -> list[InputSpec]:
    """Returns the input tensors of a traced forward.

    Args:
        forward: The forward.
        model: The model, if there is an example.
        example: An example whose values the model is to be compared on; the model is called, but does not compute.
    """
    specs = [
        InputSpec(tuple(path), tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for value in forward.inputs
        for path in value.inputs
    ]
    if model is None or example is None:
        return specs
    given = _arguments(model, example)
    if not all(_fits(spec, given.get(spec.path)) for spec in specs):
        return specs
    tensors = [given[spec.path] for spec in specs]
    if all(_is_constant(tensor) for tensor in tensors):
        return specs  # zeros or ones tell channels apart less well than random values
    is_shared = len({tensor.shape[0] for tensor in tensors if tensor.ndim}) == 1
    return [replace(spec, values=_few(tensor, is_shared)) for spec, tensor in zip(specs, tensors, strict=True)]


class _ArgumentsSeenError(Exception):
    """Ends a forward before it computes."""


def _arguments(model: nn.Module, example: Example) -> dict[tuple[Any, ...], torch.Tensor]:
    """Returns the tensors with which an example calls the model, by path."""
    found: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update({tuple(path): tensor for path, tensor in inputs_with_paths([*args])})
        found.update({tuple(path): tensor for path, tensor in inputs_with_paths(kwargs)})
        raise _ArgumentsSeenError

    handle = model.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    try:
        example.run(model, example.batch)
    except _ArgumentsSeenError:
        pass
    except Exception as error:  # the trace was made on another example, input_info
        refuse_out_of_memory(error)
        logger.debug("the model is compared on random inputs, because %s fails: %s", example.source, error)
    finally:
        handle.remove()
    return found


def _fits(spec: InputSpec, tensor: torch.Tensor | None) -> bool:
    same = tensor is not None and tensor.ndim == len(spec.shape) and str(tensor.dtype) == f"torch.{spec.dtype}"
    return same and tensor is not None and tensor.numel() > 0


def _is_constant(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all())


def _few(tensor: torch.Tensor, is_shared: bool) -> torch.Tensor:
    return (tensor[:_MOST_SAMPLES] if is_shared and tensor.ndim else tensor).detach().cpu().clone()


def batch_size(specs: Sequence[InputSpec]) -> int:
    """Returns the length of the first dimension if all inputs share it, else 1."""
    sizes = {spec.shape[0] for spec in specs if spec.shape}
    return sizes.pop() if len(sizes) == 1 else 1


def example_arguments(specs: Iterable[InputSpec], device: Any, dtype: torch.dtype | None, *, small: bool) -> Any:
    """Returns arguments (args, kwargs) of a forward: the values of the specs, random ones where there are none.

    Args:
        specs: The inputs.
        device: Where to put them.
        dtype: The type of the floating-point tensors; None for their own.
        small: Whether to give two samples instead of the batch size of the specs.
    """
    specs = list(specs)
    samples = batch_size(specs)
    is_shared = len({spec.shape[0] for spec in specs if spec.shape}) == 1
    generator = torch.Generator().manual_seed(_SEED)
    tree: dict[Any, Any] = {}
    for spec in specs:
        shape = spec.shape
        if small and samples > 2 and shape:
            shape = (2, *shape[1:])
        elif small and samples == 1 and shape and shape[0] == 1:
            shape = (2, *shape[1:])  # batch norm in training mode needs more than one value
        if spec.values is None:
            value = _random(spec, shape, generator)
        else:
            value = _resized(spec.values, shape[0]) if is_shared and shape else spec.values.clone()
        if value.is_floating_point():
            value = value.to(dtype or value.dtype)
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = value.to(device)
    positional = [key for key in tree if isinstance(key, int)]
    args = tuple(_nested(tree.get(index)) for index in range(max(positional, default=-1) + 1))
    return args, {key: _nested(value) for key, value in tree.items() if isinstance(key, str)}


def _random(spec: InputSpec, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    kind = getattr(torch, spec.dtype)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    if kind is torch.bool:
        return torch.ones(shape, dtype=kind)
    return torch.randint(0, 2, shape, generator=generator).to(kind)


def _resized(values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns `size` samples; a sample that is repeated is scaled, as batch norm would make nothing of equal ones."""
    index = torch.arange(size)
    repeated = values[index % values.shape[0]]
    if not values.is_floating_point():
        return repeated
    scale = 1 / (1 + index // values.shape[0]).to(values.dtype)
    return repeated * scale.reshape(-1, *[1] * (values.ndim - 1))


def _nested(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if all(isinstance(key, int) for key in node):
        return [_nested(node.get(index)) for index in range(max(node) + 1)]
    return _Entries({key: _nested(value) for key, value in node.items()})


class _Entries(dict[Any, Any]):
    """A dict whose entries can be read as attributes, too: it stands for dicts, dataclasses and other objects."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"inputs like those of the example have no {name!r}") from None
