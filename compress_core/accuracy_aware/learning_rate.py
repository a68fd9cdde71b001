"""Steps and scales the learning rate of whatever `configure_optimizers_fn` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from compress_core.errors import UsageError

# What schedulers read in place of the present rate: their first one, and the bounds of OneCycleLR and CyclicLR.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs")


def as_list(value: Any) -> list[Any]:
    """Returns the objects that are given: one, several, or None."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def check_schedulers(schedulers: Sequence[Any], *, updates: bool, is_searching: bool, own_update: bool) -> None:
    """Refuses schedulers whose rates would silently be wrong.

    Args:
        schedulers: The schedulers of the learning rate.
        updates: Whether the loop steps them.
        is_searching: Whether the loop scales rates.
        own_update: Whether the user steps them with a function of his own.

    Raises:
        UsageError: A plateau of what should become less, or a scheduler whose rates cannot be scaled.
    """
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            if updates and not own_update and scheduler.mode == "min":
                raise UsageError(
                    "configure_optimizers_fn: the lr_scheduler is ReduceLROnPlateau with mode='min', and it is given "
                    "the metric of validate_fn, of which more is better; create it with mode='max', or pass "
                    "update_learning_rate_fn to run()"
                )
        elif is_searching and not hasattr(scheduler, "base_lrs"):
            raise UsageError(
                f"configure_optimizers_fn: the lr_scheduler is a {type(scheduler).__name__}, which has no base_lrs for "
                'the search to scale; use another one, or set "lr_reduction_factor": 1.0 in '
                "accuracy_aware_training.params"
            )


def scale(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], factor: float) -> None:
    """Multiplies all learning rates, present and future, by a factor."""
    if factor == 1.0:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update({key: group[key] * factor for key in _GROUP_RATES if key in group})
    for scheduler in schedulers:
        for key in _SCHEDULER_RATES:
            if hasattr(scheduler, key):
                setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])


def step(schedulers: Sequence[Any], best_metric: float | None) -> None:
    """Begins the next epoch of each scheduler.

    Args:
        schedulers: The schedulers.
        best_metric: Best metric since the optimizers were made, for those that wait for a plateau.
    """
    for scheduler in schedulers:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        elif best_metric is not None:
            scheduler.step(best_metric)


def learning_rate(optimizers: Sequence[Optimizer]) -> float | None:
    """Returns the rate of the first group of the first optimizer."""
    return float(optimizers[0].param_groups[0]["lr"]) if optimizers and optimizers[0].param_groups else None
