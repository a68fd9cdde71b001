"""The figures of a compressed model epoch by epoch: what pictures of a training, and loggers, are made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from compress_core.contract.clock import Clock
from compress_core.errors import UsageError
from compress_core.saved import Items, Whole

Number = int | float


@dataclass(frozen=True)
class EpochFigures:
    """The figures of a compressed model after so many epochs of training.

    Attributes:
        epochs: Number of epochs that have ended; 0 is the model before the first, or in it.
        steps: Number of optimizer steps that it has been trained for; 0 if the loop does not call `scheduler.step()`.
        measured: `compression_rate`, and of each algorithm what `statistics().scalars()` returns, measured after these
            epochs: `magnitude_sparsity/sparsity_level`, ...
        given: What the training loop has said about the last of these epochs, such as `loss`.
    """

    epochs: int
    steps: int
    measured: Mapping[str, Number]
    given: Mapping[str, Number] = field(default_factory=dict)

    @property
    def moment(self) -> tuple[int, int]:
        """Number of epochs and of steps."""
        return self.epochs, self.steps

    @property
    def values(self) -> dict[str, Number]:
        """What was given and what was measured, by name."""
        return {**self.given, **self.measured}


class SavedHistory(BaseModel):
    """A history as it is in a compression state: by column, with None where a row has no value of that name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    epochs: Items[Whole] = []
    steps: Items[Whole] = []
    measured: dict[str, Items[int | float | None]] = {}
    given: dict[str, Items[int | float | None]] = {}

    @model_validator(mode="after")
    def _is_a_table(self) -> SavedHistory:
        columns = [("steps", len(self.steps))]
        columns += [(name, len(column)) for table in (self.measured, self.given) for name, column in table.items()]
        for name, length in columns:
            if length != len(self.epochs):
                raise ValueError(f"'{name}' has {length} entries, and 'epochs' {len(self.epochs)}")
        if any(later <= earlier for earlier, later in zip(self.epochs, self.epochs[1:], strict=False)):
            raise ValueError("'epochs' does not go up")
        return self


class History:
    """What was measured at the end of each epoch, and before the first; part of the compression state."""

    def __init__(self) -> None:
        self._rows: list[EpochFigures] = []

    def record(self, row: EpochFigures) -> EpochFigures:
        """Adds a row; a training that was taken back to an earlier epoch begins to write its history anew there.

        Returns:
            The row, with what had been given for its epoch before.
        """
        row = self._completed(row)
        self._rows = [*self._before(row), row]
        return row

    def until(self, row: EpochFigures) -> tuple[EpochFigures, ...]:
        """Returns the rows before a row that is not recorded yet, and that row."""
        return (*self._before(row), self._completed(row))

    def _before(self, row: EpochFigures) -> list[EpochFigures]:
        return [earlier for earlier in self._rows if earlier.epochs < row.epochs]

    def _completed(self, row: EpochFigures) -> EpochFigures:
        given = next((same.given for same in self._rows if same.epochs == row.epochs), {})
        return EpochFigures(row.epochs, row.steps, row.measured, {**given, **row.given})

    def to_dict(self) -> dict[str, Any]:
        """Returns it JSON-able; see `SavedHistory`."""
        return {
            "epochs": [row.epochs for row in self._rows],
            "steps": [row.steps for row in self._rows],
            "measured": _columns([row.measured for row in self._rows]),
            "given": _columns([row.given for row in self._rows]),
        }

    def load(self, saved: SavedHistory) -> None:
        """Takes over a history that was saved."""
        self._rows = [
            EpochFigures(epochs, steps, _row(saved.measured, number), _row(saved.given, number))
            for number, (epochs, steps) in enumerate(zip(saved.epochs, saved.steps, strict=True))
        ]


def figures_at(clock: Clock, measured: Mapping[str, Number], given: Mapping[str, Any] | None = None) -> EpochFigures:
    """Returns the figures of the model as it is now.

    Args:
        clock: The clock, with the epoch that has been trained as its current one.
        measured: What was measured.
        given: What the user says about this epoch: numbers, or tensors of one.

    Raises:
        UsageError: What is given is no number, or has the name of what is measured.
    """
    numbers = {name: _number(name, value) for name, value in (given or {}).items()}
    for name in numbers:
        if name in measured or name in ("epochs", "steps"):
            raise UsageError(f"'{name}' is measured; give your value another name")
    # Plugins may measure with NumPy, whose numbers print otherwise.
    plain = {name: float(v) if isinstance(v, float) else int(v) for name, v in measured.items()}
    return EpochFigures(clock.epoch + 1, clock.step + 1, plain, numbers)


def _number(name: str, value: Any) -> Number:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"'{name}' must be a number, or a tensor of one, got {_described(value)}")
    try:
        number = float(value)
    except OverflowError as error:
        raise UsageError(f"'{name}' is larger than any floating-point number") from error
    return int(value) if isinstance(value, int) and math.isfinite(number) and abs(number) < 2**63 else number


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r:.80}" if isinstance(value, (bool, str, type(None))) else f"a {type(value).__name__}"


def _columns(rows: Iterable[Mapping[str, Number]]) -> dict[str, list[Number | None]]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(columns: Mapping[str, list[int | float | None]], number: int) -> dict[str, Number]:
    return {name: value for name, column in columns.items() if (value := column[number]) is not None}
