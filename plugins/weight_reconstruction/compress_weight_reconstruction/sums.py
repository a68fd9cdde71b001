"""Residual sums: which product makes the last summand of a sum, and where the other summand comes from.

A layer before a residual sum can make up for a part of the error that the other summand has already, the shortcut. For
this the shortcut has to be known when the layer is reached. It is found again by the number of the call that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from compress_weight_reconstruction.marks import Marks

_SUMS = frozenset(
    {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__}
)
_NORMS = frozenset({F.batch_norm, torch.batch_norm})


class Sums:
    """Follows the calls of one forward.

    Args:
        wanted: Name of a weight -> number of the call whose result is kept until its product is reached.

    Attributes:
        shortcuts: Name of a weight -> number of the call that makes the other summand of the sum that its output goes
            to, directly or through a batch norm; only where that comes before the product.
        through_norm: Names of the weights whose output goes to the sum through a batch norm.
    """

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self._wanted: dict[int, list[str]] = {}
        for name, number in wanted.items():
            self._wanted.setdefault(number, []).append(name)
        self._kept: dict[str, torch.Tensor] = {}
        self._number = 0
        self._made_at = Marks[int]()
        # Outputs of products, or of the batch norms behind them -> (name of the weight, number of the product, whether
        # a batch norm is between).
        self._summands = Marks[tuple[str, int, bool]]()
        self.shortcuts: dict[str, int] = {}
        self.through_norm: set[str] = set()

    def product(self, name: str, result: torch.Tensor) -> None:
        """Notes the result of a product."""
        self._note(result)
        self._summands.set(result, (name, self._number, False))

    def call(self, func: Any, args: Any, result: Any) -> None:
        """Notes another call and its result."""
        if not isinstance(result, torch.Tensor):
            return
        if func in _SUMS and len(args) == 2 and all(isinstance(arg, torch.Tensor) for arg in args):
            self._find_shortcut(args[0], args[1])
            self._find_shortcut(args[1], args[0])
        summand = self._summands.get(args[0]) if func in _NORMS and args else None
        self._note(result)
        if summand is not None:
            self._summands.set(result, (*summand[:2], True))

    def take(self, name: str) -> torch.Tensor | None:
        """Returns the shortcut that was kept for a weight's product, and forgets it."""
        return self._kept.pop(name, None)

    def _note(self, result: torch.Tensor) -> None:
        self._number += 1
        self._made_at.set(result, self._number)
        for name in self._wanted.get(self._number, ()):
            self._kept[name] = result

    def _find_shortcut(self, summand: torch.Tensor, other: torch.Tensor) -> None:
        found, made_at = self._summands.get(summand), self._made_at.get(other)
        if found is not None and made_at is not None and summand.shape == other.shape:
            name, number, is_normed = found
            if made_at < number:
                self.shortcuts[name] = made_at
                self.through_norm |= {name} if is_normed else set()
