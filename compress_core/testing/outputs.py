"""What models return, run and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress_core.torch_internals import tree_leaves


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Returns what a model computes in eval mode, in which it stays."""
    model.eval()
    with torch.no_grad():
        return model(*inputs)


def leaves(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in what a model returns."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def scalar(output: Any) -> torch.Tensor:
    """Returns a loss that depends on everything in what a model returns."""
    total = torch.zeros(())
    for leaf in leaves(output):
        total = total + leaf.float().square().mean()
    return total


def same(actual: Any, expected: Any) -> bool:
    """Tells whether two outputs are equal, element by element; NaN equals NaN."""
    left, right = leaves(actual), leaves(expected)
    return len(left) == len(right) and all(
        a.shape == e.shape and torch.equal(a.isnan(), e.isnan()) and torch.equal(a.nan_to_num(), e.nan_to_num())
        for a, e in zip(left, right, strict=True)
    )


def difference(actual: Any, expected: Any) -> str:
    """Returns in words how two outputs differ."""
    found = []
    for a, e in zip(leaves(actual), leaves(expected), strict=False):
        if a.shape != e.shape:
            return f"shapes {tuple(a.shape)} and {tuple(e.shape)}"
        found.append(float((a.double() - e.double()).abs().max()) if a.numel() else 0.0)
    return f"the outputs differ by up to {max(found, default=0.0):.3g}"


def require_same(actual: Any, expected: Any, what: str, remedy: str) -> None:
    """Raises AssertionError unless two outputs are equal, bit for bit."""
    if not same(actual, expected):
        raise AssertionError(f"{what}: {difference(actual, expected)}. {remedy}")


def require_close(
    actual: Any, expected: Any, tolerance: float, what: str, remedy: str, *, rounding_step: float = 0.0
) -> None:
    """Raises AssertionError unless two outputs are nearly equal.

    Args:
        actual: What was computed.
        expected: What it has to be.
        tolerance: Absolute, and relative to each element.
        what: What was compared, for the message.
        remedy: What to change.
        rounding_step: For models that round: what else may differ, as a share of the largest expected value. Another
            order of sums differs in the last bit; a value that lies at the boundary between two steps then falls to
            the neighbour, and is off by one whole step, however exact the arithmetic. Behind a layer, one such flip is
            a step times one weight, which is at most one step of the output's own range unless the layer's other terms
            cancel; flips are rare, so that they do not add up. One step of the output's range is the bound therefore:
            a transform that is lost, doubled or has another scale moves the outputs by many.
    """
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        largest = float(e.detach().abs().max()) if e.numel() else 0.0
        slack = tolerance + rounding_step * largest
        if a.shape != e.shape or not torch.allclose(a, e, rtol=tolerance, atol=slack, equal_nan=True):
            raise AssertionError(f"{what}: {difference(a, e)}, and {slack:.3g} is allowed. {remedy}")
