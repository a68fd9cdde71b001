"""The inputs of an export: the arguments of forward, their batch dimension, and batches of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError
from compress_core.torch_internals import tree_flatten_with_path, tree_leaves, tree_map
from compress_core.trace import Example

# Number of samples that are compared: enough to find rare disagreements, few enough to be quick.
_MOST_SAMPLES = 16


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward.

    Attributes:
        args: Positional arguments, tensors in any nesting.
        kwargs: Keyword arguments, tensors in any nesting.
        batch_size: Size of dimension 0 that the tensors share; 0 if the first tensor has no dimensions.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order in which exporters number them."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def named(self) -> list[str]:
        """Returns a name for each tensor, for messages."""
        found, _ = tree_flatten_with_path((self.args, self.kwargs))
        return ["".join(map(str, path)) for path, leaf in found if isinstance(leaf, torch.Tensor)]

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
        return Inputs(args, kwargs, size)

    def sizes(self) -> tuple[int, int]:
        """Returns the two batch sizes to compare; the first one is used for the export.

        It is never 1, because exporters treat a dimension of size 1 as a constant.
        """
        first = min(max(self.batch_size, 2), _MOST_SAMPLES)
        return first, 1 if first > 2 else 3


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
        # A copy, because the model may write to its arguments.
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))

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
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ExportError(f"{example.source} calls the model without a tensor; pass args= to export_onnx")
    batch = tensors[0].shape[0] if tensors[0].ndim else 0
    return Inputs(tuple(args), dict(kwargs), batch)
