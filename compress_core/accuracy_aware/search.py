"""The control law of the search for the highest level at which the accuracy holds: pure, without a model.

After NNCF's mode `adaptive_compression_level`: go up while the accuracy holds, down while it does not, and halve the
change at each turn. Two things differ. A change that would pass the lowest or the highest level is cut to end there,
and that level is tried, too, once; the search ends when it would pass it again. And a budget may have any sign and
size, because "no epoch yet" is None and not a metric of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress_core.config.accuracy_aware import AccuracyAwareParams

# Digits of a level. Sums of steps are rounded to them, so that 0.7 + 0.1 is the same level as 0.9 - 0.1.
_DIGITS = 10

End = Literal["", "step", "highest", "lowest"]


@dataclass(frozen=True)
class SearchRules:
    """The numbers of the config.

    Attributes:
        smallest_step: The search ends when the change is smaller than this.
        step_factor: Factor on the change at each turn.
        lr_factor: Factor on the learning rate at each turn.
        patience: Epochs at a level after which it is given up.
        lowest: Lowest level.
        highest: Highest level.
    """

    smallest_step: float
    step_factor: float
    lr_factor: float
    patience: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, params: AccuracyAwareParams, lowest: float, highest: float) -> SearchRules:
        """Returns the rules of a config."""
        return cls(
            params.minimal_compression_rate_step,
            params.compression_rate_step_reduction_factor,
            params.lr_reduction_factor,
            params.patience_epochs,
            lowest,
            highest,
        )


class SearchState(BaseModel):
    """Where the search is.

    Attributes:
        rate: The level that was asked for last; at the beginning the one that was measured.
        step: Size of the next change, before it is reduced at a turn.
        lr: Factor on the learning rate.
        sign: Direction of the last change; 0 before the first.
        epochs: Epochs at this level.
        best: Largest budget (metric minus the lowest allowed one) at this level; None if it was not a number yet.
        forced: Whether the next change is due whatever the budget is: at the beginning, and after an early stop.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    rate: float
    step: float
    lr: float = 1.0
    sign: Literal[-1, 0, 1] = 0
    epochs: int = 0
    best: float | None = None
    forced: bool = True


class RateSearch:
    """Says after each epoch at which level the next one trains.

    Args:
        rules: The numbers of the config.
        state: Where the search is.
    """

    def __init__(self, rules: SearchRules, state: SearchState) -> None:
        self.rules, self.state = rules, state
        self.end: End = ""

    def observe(self, budget: float | None, *, stopped: bool) -> None:
        """Takes note of an epoch at the present level.

        Args:
            budget: Metric minus the lowest allowed one; None if the metric was not a number.
            stopped: Whether the user asks to leave this level.
        """
        state = self.state
        state.epochs += 1
        if budget is not None:
            state.best = budget if state.best is None else max(state.best, budget)
        state.forced = stopped

    def move(self) -> float | None:
        """Returns the level to go to before the next epoch; None to stay, or if the search is over (`end`)."""
        state, rules = self.state, self.rules
        if state.step < rules.smallest_step:
            self.end = "step"
            return None
        holds = state.best is not None and state.best >= 0
        if not (holds or state.forced or state.epochs >= rules.patience):
            return None
        sign: Literal[-1, 1] = 1 if holds else -1
        if (sign > 0 and state.rate >= rules.highest) or (sign < 0 and state.rate <= rules.lowest):
            self.end = "highest" if sign > 0 else "lowest"
            return None
        turns = state.sign not in (0, sign)
        step = state.step * (rules.step_factor if turns else 1.0)
        # Rounded first: a bound is met exactly, so that the next change finds itself there.
        rate = min(max(round(state.rate + sign * step, _DIGITS), rules.lowest), rules.highest)
        lr = state.lr * (rules.lr_factor if turns else 1.0)
        self.state = SearchState(rate=rate, step=step, lr=lr, sign=sign, forced=False)
        return rate
