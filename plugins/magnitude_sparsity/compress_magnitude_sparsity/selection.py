"""Finds the k smallest importances over any number of tensors, exactly, without sorting and without copies.

For non-negative floats, the order of the values is the order of their bits. So the k-th smallest importance is found
digit by digit: a histogram of the upper 16 bits gives the bin that contains it, and a histogram of the next 16 bits
within that bin gives the rest. Tensors are read in pieces of constant size, and masks are overwritten in place, so
nothing of the size of the model is allocated. Unlike sorting and partitioning, this is not slower if most weights are
already zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress_core import ModelError

# Number of elements processed at a time: their importances (4 MiB) fit into a processor's cache.
_PIECE = 1 << 20
_BLOCK = 1 << 16
_DIGIT_BITS = 16


@dataclass(frozen=True)
class RankedTensor:
    """A weight whose elements are ranked by importance, |w| / scale.

    Attributes:
        name: Dotted name, for messages.
        values: The weight, any floating dtype.
        scale: The divisor.
    """

    name: str
    values: torch.Tensor
    scale: float = 1.0

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yields the importances in the order of the elements, as float32 (float64 for float64), flat."""
        flat = self.values.detach().reshape(-1)
        for piece in torch.split(flat, _PIECE) if flat.numel() else ():
            wide = piece.abs() if piece.dtype in (torch.float32, torch.float64) else piece.float().abs()
            yield wide if self.scale == 1.0 else wide.div_(self.scale)


def layer_scale(values: torch.Tensor) -> float:
    """Returns the L2 norm of a tensor for `normed_abs`, or 1 if all weights are zero."""
    norm = float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))
    return norm if norm > 0 else 1.0


@dataclass(frozen=True)
class Selection:
    """The elements to mask: all below a threshold, and the first few that equal it.

    Attributes:
        tensors: The tensors that were ranked together.
        kept: For each tensor, the flat index of the element that is never masked.
        threshold: Importance of the last element to mask; None if nothing is masked.
        ties: Number of elements equal to the threshold that are masked, in the order of the tensors.
    """

    tensors: Sequence[RankedTensor]
    kept: Sequence[int | None]
    threshold: torch.Tensor | None
    ties: int

    def write(self, masks: Sequence[torch.Tensor]) -> None:
        """Overwrites the masks of all tensors with zeros and ones, in place."""
        ties = self.ties
        for tensor, index, mask in zip(self.tensors, self.kept, masks, strict=True):
            if self.threshold is None:
                mask.fill_(1)
            else:
                ties = _write_mask(mask, tensor, index, self.threshold, ties)


def select(tensors: Sequence[RankedTensor], count: int) -> Selection:
    """Finds the `count` least important elements of all tensors together.

    Ties are broken by position: among equal elements, the first ones are masked. The most important element of each
    tensor (among equal ones the last) is never masked, so that no layer is emptied.

    Args:
        tensors: The tensors to rank together; their order matters for ties.
        count: Number of elements to mask; fewer are masked if there are not enough.

    Raises:
        ModelError: A weight is NaN or infinite. Nothing has been written.
    """
    largest = [_last_largest(tensor) for tensor in tensors]
    kept = [None if found is None else found[0] for found in largest]
    never_masked = [found[1] for found in largest if found is not None]
    droppable = sum(tensor.values.numel() for tensor in tensors) - len(never_masked)
    count = min(count, droppable)
    if count <= 0:
        return Selection(tensors, kept, None, 0)
    threshold, ties = _kth_smallest(tensors, never_masked, count)
    return Selection(tensors, kept, threshold, ties)


def _last_largest(tensor: RankedTensor) -> tuple[int, float] | None:
    """Returns the flat index and the importance of the most important element, the last one among equal ones."""
    best, index, offset = -1.0, None, 0
    for piece in tensor.pieces():
        largest = float(piece.max())
        if not largest < float("inf"):
            raise ModelError(f"the weight '{tensor.name}' holds NaN or infinity; repair it before compression")
        if largest >= best:
            best = largest
            index = offset + _last_equal(piece, largest)
        offset += piece.numel()
    return None if index is None else (index, best)


def _last_equal(values: torch.Tensor, wanted: float) -> int:
    """Returns the index of the last element that equals `wanted`, searching from the end."""
    end = values.numel()
    for block in reversed(torch.split(values, _BLOCK)):
        end -= block.numel()
        if float(block.max()) == wanted:
            return end + int((block == wanted).nonzero()[-1])
    raise AssertionError("the value is not there")


def _digits(dtype: torch.dtype) -> tuple[torch.dtype, range]:
    """Returns the integer type of the same width, and the shifts of its 16-bit digits, the highest first."""
    integer, bits = (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)
    return integer, range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS)


def _kth_smallest(
    tensors: Sequence[RankedTensor], never_masked: Sequence[float], count: int
) -> tuple[torch.Tensor, int]:
    """Returns the importance of rank `count` (from 1, without `never_masked`), and how many ties have to be masked."""
    wide = torch.float64 if any(t.values.dtype == torch.float64 for t in tensors) else torch.float32
    integer, shifts = _digits(wide)
    device = tensors[0].values.device
    left_out = torch.tensor(never_masked, dtype=wide, device=device).view(integer)
    prefix, remaining = 0, count
    for shift in shifts:
        histogram = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64, device=device)
        for batch in _batches(tensors):
            histogram += _histogram(batch.to(wide).view(integer), shift, prefix).to(device)
        histogram -= _histogram(left_out, shift, prefix)
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, remaining))
        remaining -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT_BITS) | digit
    return torch.tensor(prefix, dtype=integer).view(wide), remaining


def _batches(tensors: Iterable[RankedTensor]) -> Iterator[torch.Tensor]:
    """Yields the importances of all tensors, those of small ones together: it takes as long to count ten as 65,536."""
    waiting: list[torch.Tensor] = []
    size = 0
    for piece in (piece for tensor in tensors for piece in tensor.pieces()):
        alike = not waiting or (piece.device, piece.dtype) == (waiting[0].device, waiting[0].dtype)
        if waiting and not (alike and size + piece.numel() <= _PIECE):
            yield torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            waiting, size = [], 0
        waiting.append(piece)
        size += piece.numel()
    if waiting:
        yield torch.cat(waiting) if len(waiting) > 1 else waiting[0]


def _histogram(bits: torch.Tensor, shift: int, prefix: int) -> torch.Tensor:
    """Counts the 16-bit digits at `shift` of the numbers whose higher digits are `prefix`."""
    bins = 1 << _DIGIT_BITS
    # Numbers with other higher digits are clamped into an extra bin at either end.
    digits = (bits >> shift).sub_(prefix << _DIGIT_BITS).clamp_(-1, bins).add_(1)
    return torch.bincount(digits, minlength=bins + 2)[1:-1]


def _write_mask(mask: torch.Tensor, tensor: RankedTensor, index: int | None, threshold: torch.Tensor, ties: int) -> int:
    """Writes the mask of one tensor; returns the number of ties left for the following tensors."""
    limit = threshold.to(tensor.values.device)
    # In the order of the elements, so a mask in another memory layout (channels_last) is filled through a copy.
    flat = mask.view(-1) if mask.is_contiguous() else torch.empty(mask.numel(), dtype=mask.dtype, device=mask.device)
    offset = 0
    for piece in tensor.pieces():
        wide = piece.to(limit.dtype)
        part = flat[offset : offset + piece.numel()]
        torch.gt(wide, limit, out=part)
        if index is not None and offset <= index < offset + piece.numel():
            part[index - offset] = 1
        ties -= _keep_later_ties(part, wide, limit, ties)
        offset += piece.numel()
    if not mask.is_contiguous():
        mask.copy_(flat.view(mask.shape))
    return ties


def _keep_later_ties(part: torch.Tensor, values: torch.Tensor, limit: torch.Tensor, ties: int) -> int:
    """Keeps all but the first `ties` elements that equal the limit; returns how many were masked."""
    is_tie = (values == limit) & (part == 0)  # part is 1 at the element that is never masked
    # numpy counts booleans thirty times as fast as torch does on the CPU.
    count = int(np.count_nonzero(is_tie.numpy())) if is_tie.device.type == "cpu" else int(is_tie.sum())
    if count > ties:
        part[is_tie.nonzero().flatten()[ties:]] = 1
    return min(ties, count)
