"""The writers that a controller logs its figures to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from compress_core.contract.clock import Clock
from compress_core.data.ranks import is_first_rank
from compress_core.errors import UsageError
from compress_core.session.history import EpochFigures
from compress_core.session.log_writers import ToFile, Writer, writer_of

logger = logging.getLogger(__name__)


@dataclass
class _Target:
    writer: Writer
    name: str
    every_steps: int | None
    # What was written last, and of which moment.
    moment: tuple[int, int] = (-1, -1)
    names: set[str] = field(default_factory=set)
    has_warned: bool = False

    def write(self, figures: EpochFigures) -> None:
        names = {*figures.measured, *figures.given}
        if figures.moment == self.moment:
            figures = replace(
                figures,
                measured={n: v for n, v in figures.measured.items() if n not in self.names},
                given={n: v for n, v in figures.given.items() if n not in self.names},
            )
            names |= self.names
            if names == self.names:
                return
        try:
            self.writer.write(figures, figures.epochs if self.every_steps is None else figures.steps)
        except BaseException as error:
            error.add_note(f"raised by {self.name}, which log_to was given, for the figures after {_when(figures)}")
            raise
        self.moment, self.names = figures.moment, names


class Logbook:
    """Writes figures to all writers; copies of it, pickled ones too, have none: they are of other models."""

    def __init__(self) -> None:
        self._targets: list[_Target] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_targets": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Logbook:
        return Logbook()

    def add(self, given: Any, every_steps: int | None, clock: Clock) -> None:
        """Adds a writer; see `CompressionController.log_to`.

        Raises:
            UsageError: It is no writer, or `every_steps` is no whole number from 1 on.
            FileError: A file cannot be read.
        """
        if every_steps is not None and (type(every_steps) is not int or every_steps < 1):
            raise UsageError(f"every_steps: must be a whole number from 1 on, or None, got {every_steps!r}")
        if not is_first_rank():
            return
        writer, name = writer_of(given, begins=clock.epoch < 0 and clock.step < 0)
        if isinstance(writer, ToFile):  # of which there is one object for each file
            place = writer.file.path.resolve()
            files = [t.writer.file for t in self._targets if isinstance(t.writer, ToFile)]
            writer = ToFile(next((file for file in files if file.path.resolve() == place), writer.file))
        self._targets.append(_Target(writer, name, every_steps))

    def at_epoch(self, figures: EpochFigures) -> None:
        """Writes the figures of an epoch that has ended."""
        for target in self._targets:
            if target.every_steps is not None and figures.epochs and not figures.steps and not target.has_warned:
                logger.warning(
                    "%s gets figures by optimizer steps (every_steps=%d), and the training loop does not call "
                    "controller.scheduler.step(): all of them are at step 0",
                    target.name,
                    target.every_steps,
                )
                target.has_warned = True
            target.write(figures)

    def at_step(self, clock: Clock, figures: Callable[[], EpochFigures]) -> None:
        """Writes figures to those who want them now.

        Args:
            clock: The clock, before the next step.
            figures: Measures them.
        """
        due = [t for t in self._targets if t.every_steps is not None and (clock.step + 1) % t.every_steps == 0]
        if not due:
            return
        # Within an epoch, which has not ended.
        now = replace(figures(), epochs=max(clock.epoch, 0))
        for target in due:
            target.write(now)


def _when(figures: EpochFigures) -> str:
    return f"{figures.epochs} epochs and {figures.steps} steps"
