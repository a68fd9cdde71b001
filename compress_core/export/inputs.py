"""The inputs of an export: the arguments of forward, their batch dimension, and batches of other sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError
from compress_core.torch_internals import tree_flatten_with_path, tree_leaves, tree_map
from compress_core.trace import Example

# Number of samples that are compared: enough to find rare disagreements, few enough to be quick.
_MOST_SAMPLES = 16
# Types of arguments that torch.export takes beside tensors.
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

BATCH = "batch"


@dataclass(frozen=True)
class Varying:
    """A size that the user has named, because it varies.

    Attributes:
        name: Its name.
        places: The dimensions that have this size: (number of the tensor, dimension).
    """

    name: str
    places: tuple[tuple[int, int], ...]

    def others(self, size: int) -> list[int]:
        """Returns other sizes to compare on, the first that the model takes is used; `size` is that of the example."""
        likely = [size + 1, 2 * size, size // 2, size - 1, *(size + step for step in (2, 4, 8, 16, 32, 64))]
        if size > 2 and all(dim == 0 for _, dim in self.places):
            likely.insert(0, 1)  # what a model does with single samples is most often something else
        return [other for other in dict.fromkeys(likely) if other > 0 and other != size]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward.

    Attributes:
        args: Positional arguments, tensors in any nesting.
        kwargs: Keyword arguments, tensors in any nesting.
        batch_size: Size of dimension 0 of the tensors that have a batch dimension; 0 if no tensor has dimensions, or
            the user has named the batch.
        varying: The sizes that the user has named.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    varying: tuple[Varying, ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order in which exporters number them."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def constants(self) -> list[str]:
        """Returns the arguments that are no tensors, as `path = value`; a file holds them as constants."""
        return [f"{path} = {leaf!r:.60}" for path, leaf in self._others() if leaf is not None]

    def unsupported(self) -> list[str]:
        """Returns the arguments of types that torch.export does not take, as `path (type)`."""
        return [f"{path} ({type(leaf).__name__})" for path, leaf in self._others() if not isinstance(leaf, _PLAIN)]

    def _others(self) -> Iterator[tuple[str, Any]]:
        for given in (self.args, self.kwargs):
            for path, leaf in tree_flatten_with_path(given)[0]:
                if not isinstance(leaf, torch.Tensor):
                    yield f"argument {''.join(map(str, path))}", leaf

    def batch_sizes(self) -> list[int]:
        """Returns what may be the batch size, the likeliest first: the size that most tensors share, but 1 last.

        A first dimension of 1 often belongs to a tensor for all samples, such as positions or a mask.
        """
        found = Counter(tensor.shape[0] for tensor in self.tensors if tensor.ndim and tensor.shape[0])
        return sorted(found, key=lambda size: (size == 1, -found[size]))

    def has_batch(self, tensor: torch.Tensor) -> bool:
        """Returns whether dimension 0 of a tensor is the batch."""
        return self.batch_size > 0 and tensor.ndim > 0 and tensor.shape[0] == self.batch_size

    def resized(self, size: int) -> Inputs:
        """Returns the first `size` samples, repeated if there are fewer."""

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not self.has_batch(leaf):
                return leaf
            return leaf[torch.arange(size) % self.batch_size]

        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, batch_size=size)

    def size_of(self, entry: Varying) -> int:
        """Returns the size that a name stands for."""
        number, dim = entry.places[0]
        return self.tensors[number].shape[dim]

    def with_size(self, entry: Varying, size: int) -> Inputs:
        """Returns inputs of which a named size is another: the beginning, repeated if there is less."""
        numbers = iter(range(len(self.tensors)))

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            number = next(numbers)
            for place, dim in entry.places:
                if place == number:
                    leaf = leaf.index_select(dim, torch.arange(size) % leaf.shape[dim])
            return leaf

        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    @property
    def label(self) -> str:
        """The named sizes, in words."""
        return ", ".join(f"{entry.name} {self.size_of(entry)}" for entry in self.varying)

    @property
    def described(self) -> str:
        """The batch size and the named sizes, in words."""
        if not self.varying:
            return f"a batch of {self.batch_size}"
        return f"inputs of {f'batch {self.batch_size}, ' if self.batch_size else ''}{self.label}"

    def copied(self) -> Inputs:
        """Returns copies of the tensors, because a model may write to its arguments."""
        args, kwargs = tree_map(_copied, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def to_double(self) -> Inputs:
        """Returns copies of the tensors, floating ones in float64."""

        def change(leaf: Any) -> Any:
            is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.double() if is_float else _copied(leaf)

        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def sizes(self) -> tuple[int, tuple[int, ...]]:
        """Returns the batch size to export with, and others to compare on, of which the first that works is used.

        The first one is never 1, because exporters treat a dimension of size 1 as a constant.
        """
        first = min(max(self.batch_size, 2), _MOST_SAMPLES)
        return first, (*((1,) if first > 2 else (3, 1)), first + 1, 2 * first)


def inputs_of(example: Example, model: nn.Module) -> Inputs:
    """Returns the arguments with which an example calls a model.

    Args:
        example: The example.
        model: A copy of the model, in eval mode; its forward runs.

    Raises:
        ExportError: The model is not called, or fails.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append((args, kwargs))
        return tree_map(_copied, (args, kwargs))  # the model may write to them

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            example.run(model, example.batch)
    except Exception as error:
        error.add_note(f"raised by the model on {example.source}, which it is exported with; pass args= to export_onnx")
        raise
    finally:
        handle.remove()
    if not seen:
        raise ExportError(f"{example.source} does not call the model itself, so there is nothing to export; pass args=")
    args, kwargs = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf, seen[0])
    inputs = Inputs(tuple(args), dict(kwargs), 0)
    if not inputs.tensors:
        given = f", but with {', '.join(found)}" if (found := inputs.unsupported()) else ""
        raise ExportError(f"{example.source} calls the model without a tensor{given}; pass args= to export_onnx")
    return replace(inputs, batch_size=next(iter(inputs.batch_sizes()), 0))


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
