"""Replays the decisions of one forward in another, so that ties are broken the same way in both.

Top-k, sorting, comparisons and non-maximum suppression are discrete functions: two forwards that agree up to rounding
may choose different boxes, and then have nothing in common to compare. So the decisions of the first forward are
recorded, and the second one gets them wherever it decides on the same values. What it decides on others stays its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress_core.torch_internals import TorchDispatchMode, schema_of, tree_leaves, tree_map


@dataclass(frozen=True)
class Decision:
    """An operator that returned something discrete for floating-point values.

    Attributes:
        values: The floating-point tensors that it was given.
        results: What it returned, in the order of its leaves: tensors and numbers.
    """

    values: list[torch.Tensor]
    results: list[Any]


class Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the decisions of a forward, or replays those of another one.

    Args:
        recorded: Operator -> its decisions in the forward to follow, in order; None to record.
        agree: Whether two tensors are the same up to rounding.
    """

    def __init__(
        self,
        recorded: dict[str, list[Decision]] | None = None,
        agree: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, list[Decision]] = defaultdict(list)
        self._recorded, self._agree = recorded, agree

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        values = [leaf for leaf in tree_leaves((args, kwargs)) if _is_continuous(leaf)]
        if not values or schema_of(func).is_mutable or not any(_is_discrete(leaf) for leaf in leaves):
            return result
        known = self.found[str(func)]
        # Copies, because the forward may write to these tensors.
        known.append(Decision([value.clone() for value in values], [_copied(leaf) for leaf in leaves]))
        if self._recorded is None or len(known) > len(self._recorded.get(str(func), ())):
            return result
        before = self._recorded[str(func)][len(known) - 1]
        if len(before.values) != len(values) or len(before.results) != len(leaves):
            return result
        if not all(map(self._agree, before.values, values)):
            return result
        results = iter(before.results)
        return tree_map(lambda leaf: _chosen(leaf, next(results)), result)


def _chosen(own: Any, recorded: Any) -> Any:
    return _copied(recorded) if _is_discrete(own) else own


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _is_continuous(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _is_discrete(leaf: Any) -> bool:
    """Returns whether a result is a decision: indices, flags, or a number that Python code goes on with."""
    if isinstance(leaf, torch.Tensor):
        return not leaf.is_floating_point() and not leaf.is_complex()
    return isinstance(leaf, (bool, int, float))
