"""`CompressionScheduler`: tells the algorithms of one model when an epoch or a step begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from compress_core.contract.clock import Clock
from compress_core.errors import UsageError
from compress_core.saved import damaged, parsed


class CompressionScheduler:
    """Tells the algorithms when an epoch or a step begins; has the interface of NNCF's scheduler.

    Call `epoch_step()` at the beginning of each epoch and `step()` at the beginning of each optimizer step.

    Args:
        on_step: Called with the clock at each step.
        on_epoch: Called with the clock at each epoch.
        run: Runs a function that calls one of these and sets the clock, all or nothing; the second argument says
            whether that will nearly always change nothing, the third what is called.
    """

    def __init__(
        self,
        on_step: Callable[[Clock], None],
        on_epoch: Callable[[Clock], None],
        run: Callable[[Callable[[], None], bool, str], None] = lambda function, lazily, call: function(),
    ) -> None:
        self._on_step = on_step
        self._on_epoch = on_epoch
        self._run = run
        self.clock = Clock()

    @property
    def current_step(self) -> int:
        """Index of the current optimizer step over all epochs; -1 before the first."""
        return self.clock.step

    @property
    def current_epoch(self) -> int:
        """Index of the current epoch; -1 before the first."""
        return self.clock.epoch

    def step(self, next_step: int | None = None) -> None:
        """Begins the next optimizer step, or the one given; the clock moves only if no algorithm raises an error."""
        self._run(lambda: self._begin_step(next_step), True, f"scheduler.step({_next(self.clock.step, next_step)})")

    def _begin_step(self, next_step: int | None) -> None:
        step = self.clock.step + 1 if next_step is None else _index("step", next_step)
        in_epoch = self.clock.step_in_epoch + (step - self.clock.step)
        self._begin(self._on_step, Clock(self.clock.epoch, step, max(in_epoch, 0), self.clock.steps_per_epoch))

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begins the next epoch, or the one given; the clock moves only if no algorithm raises an error."""
        call = f"scheduler.epoch_step({_next(self.clock.epoch, next_epoch)})"
        self._run(lambda: self._begin_epoch(next_epoch), False, call)

    def _begin_epoch(self, next_epoch: int | None) -> None:
        clock = self.clock
        epoch = clock.epoch + 1 if next_epoch is None else _index("epoch", next_epoch)
        steps = clock.step_in_epoch + 1 if clock.step_in_epoch >= 0 else clock.steps_per_epoch
        self._begin(self._on_epoch, Clock(epoch, clock.step, -1, steps))

    def _begin(self, tell: Callable[[Clock], None], clock: Clock) -> None:
        tell(clock)
        self.clock = clock

    def get_state(self) -> dict[str, Any]:
        """Returns the clock, JSON-able."""
        return asdict(self.clock)

    def load_state(self, state: Mapping[str, Any], path: str = "scheduler") -> None:
        """Sets the clock without calling the algorithms.

        Args:
            state: What `get_state` returned.
            path: Where it is, for messages.

        Raises:
            StateError: The state was not returned by `get_state`.
        """
        clock = parsed(Clock, state, path)
        if missing := asdict(clock).keys() - state.keys():
            raise damaged(f"{path}.{min(missing)}", "is required")
        bounds = {"epoch": -1, "step": -1, "step_in_epoch": -1, "steps_per_epoch": 1}
        for name, lowest in bounds.items():
            value = getattr(clock, name)
            if value is not None and value < lowest:
                raise damaged(f"{path}.{name}", f"must be at least {lowest}, got {value}")
        if clock.step_in_epoch > clock.step:
            raise damaged(f"{path}.step_in_epoch", f"is beyond the step {clock.step}, got {clock.step_in_epoch}")
        self.clock = clock


def _next(now: int, given: Any) -> str:
    return repr(now + 1 if given is None else given)


def _index(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(
            f"the index of {'an' if what == 'epoch' else 'a'} {what} is a whole number from 0 on, got {value!r}"
        )
    return value
