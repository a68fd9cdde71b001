"""How far the outputs of two models are apart."""

from __future__ import annotations

from typing import Any

import torch

from compress_core.torch_internals import tree_leaves


class OutputError:
    """Mean squared difference of outputs divided by their variance, pooled over batches.

    Each tensor of the output counts the same.
    """

    def __init__(self) -> None:
        # For each tensor of the output: squared differences, values, their squares, number.
        self._sums: list[torch.Tensor] | None = None
        self._is_comparable = True

    def add(self, output: Any, expected: Any) -> None:
        """Adds the outputs of one batch."""
        left, right = _floating(output), _floating(expected)
        if not left or [t.shape for t in left] != [t.shape for t in right]:
            self._is_comparable = False
            return
        found = [
            torch.stack([(a - b).square().sum(), b.sum(), b.square().sum(), b.new_tensor(b.numel())])
            for a, b in zip(left, right, strict=True)
        ]
        if self._sums is None:
            self._sums = found
        elif len(self._sums) == len(found):
            self._sums = [a + b for a, b in zip(self._sums, found, strict=True)]
        else:
            self._is_comparable = False

    def value(self) -> float | None:
        """Returns the error; None if there were no outputs to compare."""
        if self._sums is None or not self._is_comparable:
            return None
        ratios = []
        for difference, total, squares, count in self._sums:
            variance = squares - total.square() / count.clamp_min(1)
            ratios.append(float(difference / variance.clamp_min(torch.finfo(torch.float64).tiny)))
        return sum(ratios) / len(ratios)


def _floating(output: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach().double() for leaf in leaves if leaf.is_floating_point() and leaf.numel()]
