"""The user's functions, checked when they are given and whenever they return."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from compress_core.accuracy_aware.learning_rate import as_list
from compress_core.data.ranks import exchange, number_of_ranks, together
from compress_core.errors import UsageError
from compress_core.session.controller import CompressionController

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# What NNCF declares as optional, and cannot do without.
_OPTIMIZERS = (
    "configure_optimizers_fn: a function without arguments is needed that returns (optimizer, lr_scheduler or None); "
    "the loop makes a new optimizer whenever the level changes, and saves its state with the checkpoints"
)


@dataclass(frozen=True)
class UserFunctions:
    """What `run` was given.

    Attributes:
        train_epoch: `(controller, model, epoch=, optimizer=, lr_scheduler=)`; trains one epoch.
        validate: `(model, epoch=)`; returns the metric, larger is better.
        configure_optimizers: `()`; returns (optimizer or a list, lr_scheduler or a list or None).
        early_stopping: `(metric)`; returns whether to stop.
        update_learning_rate: `(lr_scheduler, epoch, metric, loss)`.
        dump_checkpoint: `(model, controller, runner, folder)`; returns a path.
        load_checkpoint: `(model, path)`.
    """

    train_epoch: Callable[..., Any]
    validate: Callable[..., Any]
    configure_optimizers: Callable[[], Any]
    early_stopping: Callable[..., Any] | None = None
    update_learning_rate: Callable[..., Any] | None = None
    dump_checkpoint: Callable[..., Any] | None = None
    load_checkpoint: Callable[..., Any] | None = None

    def check(self) -> None:
        """Refuses what is no function, and functions that are of no use alone.

        Raises:
            UsageError: Names the argument.
        """
        for name, value in vars(self).items():
            required = name in ("train_epoch", "validate", "configure_optimizers")
            if name == "configure_optimizers" and value is None:
                raise UsageError(_OPTIMIZERS)
            if (required or value is not None) and not callable(value):
                raise UsageError(f"{name}_fn: must be a function, got {value!r}")
        if self.load_checkpoint is not None and self.dump_checkpoint is None:
            raise UsageError(
                "load_checkpoint_fn: without dump_checkpoint_fn there is nothing of yours to load; give both or neither"
            )

    def optimizers(self) -> tuple[Any, Any]:
        """Returns new optimizers and schedulers, as the user's function returns them.

        Raises:
            UsageError: It returns something else.
        """
        made = self.configure_optimizers()
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise UsageError(f"{_OPTIMIZERS}; it returned {type(made).__name__}")
        optimizer, scheduler = made
        others = [type(one).__name__ for one in as_list(optimizer) if not isinstance(one, Optimizer)]
        if others or not as_list(optimizer):
            raise UsageError(f"{_OPTIMIZERS}; its first value is {', '.join(others) or 'empty'}")
        return optimizer, scheduler

    def train(
        self, controller: CompressionController, model: nn.Module, epoch: int, optimizer: Any, scheduler: Any
    ) -> float | None:
        """Trains the epoch that the controller has begun, and returns the loss if the user's function returns one.

        Raises:
            UsageError: The user's function began an epoch of the controller itself.
        """
        clock = controller.scheduler
        begun, steps = clock.current_epoch, clock.current_step
        loss = self.train_epoch(controller, model, epoch=epoch, optimizer=optimizer, lr_scheduler=scheduler)
        if clock.current_epoch != begun:
            raise UsageError(
                "train_epoch_fn: it called controller.scheduler.epoch_step(), which the loop does itself; remove that "
                "call, and keep controller.scheduler.step() before each optimizer step"
            )
        if clock.current_step == steps and epoch == 0:
            logger.warning(
                "train_epoch_fn never called controller.scheduler.step(); call it before each optimizer step, or "
                "schedules that count steps do not move"
            )
        number = number_in(loss)
        return number if number is not None and math.isfinite(number) else None

    def metric(self, model: nn.Module, epoch: int) -> float | None:
        """Returns the metric, in a training of several processes that of the first; None if it is not a number.

        Raises:
            UsageError: The user's function returns no number, or infinity.
        """
        with torch.no_grad():
            found = self.validate(model, epoch=epoch)
        number = number_in(found)
        if number is None or number == math.inf:
            raise UsageError(f"validate_fn: must return a number, of which more is better; got {found!r}")
        number = of_first_rank("the metric", number)
        if math.isfinite(number):
            return number
        logger.warning("validate_fn returned %s after epoch %d: it counts as worse than anything else", number, epoch)
        return None

    def stops(self, metric: float | None) -> bool:
        """Returns whether the user asks to stop."""
        if self.early_stopping is None:
            return False
        return of_first_rank("early_stopping_fn", bool(self.early_stopping(math.nan if metric is None else metric)))


def number_in(value: Any) -> float | None:
    """Returns a number, or the only element of a tensor or an array; None for anything else."""
    element = getattr(value, "item", None)
    try:
        value = element() if callable(element) else value
        return None if isinstance(value, bool) or not hasattr(value, "__float__") else float(value)
    except (TypeError, ValueError, RuntimeError):  # several elements
        return None


def of_first_rank(what: str, value: Value) -> Value:
    """Returns the value of the first process, so that all go the same way."""
    with together(f"accuracy-aware training: {what}"):
        if number_of_ranks() == 1:
            return value
        first: Value = exchange(what, value)[0]
        return first
