"""The kernels as compilers get them: a few neighbouring rows of a tensor at a time.

A tensor comes in a view of `Layout.lane_shape`, (..., lanes, row), and its codes as (..., row): with four lanes, words
of 32 bits that hold a byte of each, else bytes. Besides making codes cheap to load, this keeps the loop that writes
elements and the loop that sums rows one loop: whole tensors would be written in a flat loop of their own.

What is returned is new: with results in tensors that are given, the lanes would be written twice.
"""

from __future__ import annotations

import torch

from compress_quantization.kernels import formulas
from compress_quantization.kernels.formulas import Activation, Parts, Ranges


def _of_lanes(ranges: Ranges, kind: str, lanes: int) -> list[Ranges]:
    """Returns for each lane the ranges that broadcast against its rows."""
    if kind in {"flat", "columns"}:
        return [ranges] * lanes
    step, low, high = (values.reshape(-1, lanes, 1) for values in ranges)
    return [(step[:, lane], low[:, lane], high[:, lane]) for lane in range(lanes)]


def quantize(
    x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, activation: Activation, kind: str
) -> tuple[torch.Tensor]:
    """Returns y. Here `x` is a view of `Layout.view_shape`: nothing but elements is computed."""
    if kind in {"rows", "planes"}:
        step, low, high = step.unsqueeze(-1), low.unsqueeze(-1), high.unsqueeze(-1)
    return (formulas.quantized(x, (step, low, high), activation).to(x.dtype),)


def quantize_and_encode(
    x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, activation: Activation, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y, of the shape of `x`, and the codes."""
    lanes = x.shape[-2]
    parts = []
    word = None
    for lane, ranges in enumerate(_of_lanes((step, low, high), kind, lanes)):
        y, code = formulas.encoded(x.select(-2, lane), ranges, activation)
        parts.append(y.to(x.dtype))
        if lanes == 1:
            word = code.to(torch.int8)
        else:
            byte = (code.to(torch.int32) & 255) << (8 * lane)
            word = byte if word is None else word | byte
    assert word is not None
    return torch.stack(parts, -2), word


def gradients_from_code(
    grad: torch.Tensor, code: torch.Tensor, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dx and the three sums of `formulas`.

    Args:
        grad: View of shape (rows, lanes, row), or (blocks, rows, lanes, channels) for `columns`.
        code: View of the codes without the dimension of lanes.
        kind: `flat`, `rows` or `columns`; planes come as rows.
        dtype: What is computed in.

    Returns:
        dx, and sums of shape (3, rows) for `flat`, (3, lanes, rows) for `rows`, (3, blocks, channels) for `columns`.
    """
    lanes = grad.shape[-2]
    parts = []
    for lane in range(lanes):
        # Shifted to the left and back, so that the sign comes along.
        byte = code if lanes == 1 else (code << (24 - 8 * lane)) >> 24
        parts.append(formulas.from_code(grad.select(-2, lane), byte.to(dtype)))
    return _collected(parts, kind, grad.dtype)


def gradients_from_input(
    grad: torch.Tensor, x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what `gradients_from_code` does where x is at hand; all of a view of `Layout.lane_shape`."""
    ranges_of = _of_lanes((step, low, high), kind, grad.shape[-2])
    parts = [
        formulas.from_input(grad.select(-2, lane), x.select(-2, lane), ranges) for lane, ranges in enumerate(ranges_of)
    ]
    return _collected(parts, kind, grad.dtype)


def _collected(parts: list[Parts], kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x = torch.stack([inside.to(dtype) for inside, *_ in parts], -2)
    terms = [[part[index] for part in parts] for index in (1, 2, 3)]
    if kind == "rows":
        return grad_x, torch.stack([term.sum(-1) for lane in terms for term in lane]).view(3, len(parts), -1)
    dim = 1 if kind == "columns" else -1
    # Added before they are summed: a sum for each lane would not fit into the registers.
    return grad_x, torch.stack([_added(lane).sum(dim) for lane in terms])


def _added(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
