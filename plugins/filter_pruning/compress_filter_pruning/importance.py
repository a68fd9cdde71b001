"""The importance of channels: one number for each channel, from the weights that produce it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from compress_core import Choice, ChoicePoint, ModelError, PluginError, callable_choice, choice
from compress_filter_pruning.config import IMPORTANCE
from compress_filter_pruning.distances import sums_of_distances
from compress_filter_pruning.measured import DataImportance


def l1_norm(filters: torch.Tensor) -> torch.Tensor:
    """Returns the L1 norm of each filter (Li et al., 2017, arXiv:1608.08710)."""
    return filters.abs().sum(1, dtype=torch.float64)


def l2_norm(filters: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm of each filter."""
    norms: torch.Tensor = torch.linalg.vector_norm(filters, dim=1, dtype=torch.float64)
    return norms


def geometric_median(filters: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each filter's distances to all others (He et al., 2019, arXiv:1811.00250, equation 5)."""
    return sums_of_distances(filters)


POINT = ChoicePoint(
    IMPORTANCE,
    "a function of the filters of a weight, a tensor of shape (filters, elements of a filter) and any floating dtype, "
    "that returns the importance of each, shape (filters,), larger for what should stay; or, if that takes data, an "
    "object with the method `measure(request)`, see `compress_filter_pruning.measured`",
    lambda value: None if isinstance(value, DataImportance) else callable_choice(value),
)

CHOICES = [
    Choice(IMPORTANCE, "L1", l1_norm),
    Choice(IMPORTANCE, "L2", l2_norm),
    Choice(IMPORTANCE, "geometric_median", geometric_median),
]


def is_cheap(kind: str) -> bool:
    """Returns whether an importance takes no longer than finding out that nothing has changed."""
    return choice(kind, IMPORTANCE) in (l1_norm, l2_norm)


def filter_importance(weight: torch.Tensor, dim: int, kind: str) -> torch.Tensor:
    """Returns the importance of each filter of a weight.

    Args:
        weight: The weight, any floating dtype.
        dim: Dimension of the filters.
        kind: Name of a choice of `filter_pruning.importance`.

    Returns:
        Shape (filters,), float64.

    Raises:
        PluginError: The function does not return one number for each filter.
    """
    filters = weight.detach().movedim(dim, 0).flatten(1) if weight.ndim > 1 else weight.detach()[:, None]
    found = choice(kind, IMPORTANCE)(filters)
    if not isinstance(found, torch.Tensor) or found.shape != filters.shape[:1]:
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise PluginError(f"the filter importance '{kind}' returned {what} for {len(filters)} filters; one number each")
    return found.detach().double()


def layer_norm(weight: torch.Tensor) -> float:
    """Returns the L2 norm of a weight, or 1 if the weight is zero."""
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    return norm if norm > 0 else 1.0


def channel_importance(
    weights: Sequence[tuple[str, torch.Tensor, int, torch.Tensor]],
    size: int,
    importance_of: Callable[[str, torch.Tensor, int], torch.Tensor],
    *,
    normalized: bool = False,
    coefficients: Mapping[str, tuple[float, float]] | None = None,
) -> torch.Tensor:
    """Returns the importance of each channel of a group: the sum over all filters that produce it.

    Args:
        weights: Name, weight, dimension of the filters, and the channel of each filter (or -1).
        size: Number of channels.
        importance_of: Takes name, weight and dimension of the filters, and returns the importance of each filter.
        normalized: Whether weights are divided by their L2 norm first, so that layers can be compared.
        coefficients: Name -> (a, b): a filter counts a * importance + b instead.

    Returns:
        Shape (size,), float64, on the CPU.

    Raises:
        ModelError: A weight is NaN or infinite.
    """
    total = torch.zeros(size, dtype=torch.float64)
    for name, weight, dim, channels in weights:
        values = importance_of(name, weight, dim).cpu()
        if not bool(values.isfinite().all()):
            raise ModelError(f"the weight '{name}' holds NaN or infinity; repair it before compression")
        if coefficients is not None:
            scale, shift = coefficients[name]
            values = scale * values + shift
        elif normalized:
            values = values / layer_norm(weight)
        wanted = channels >= 0
        total.index_add_(0, channels[wanted], values[wanted])
    return total
