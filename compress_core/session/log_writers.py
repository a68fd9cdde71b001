"""The kinds of writers that `controller.log_to` takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress_core.errors import UsageError
from compress_core.session.history import EpochFigures, Number
from compress_core.session.log_file import CsvFile

PREFIX = "compression/"
"""Begins the names of measured figures where those of others are logged, too: `compression/quantization/...`."""


class Writer(Protocol):
    """Writes figures somewhere."""

    def write(self, figures: EpochFigures, step: int) -> None:
        """Writes figures.

        Args:
            figures: The figures.
            step: What the user counts in: epochs, or optimizer steps.
        """


@dataclass
class ToFile:
    """Writes to a CSV file, whose columns count both epochs and steps."""

    file: CsvFile

    def write(self, figures: EpochFigures, step: int) -> None:
        """Writes figures."""
        self.file.write(figures.moment, figures.values)


@dataclass
class ToTensorBoard:
    """Writes with `add_scalar(name, value, step)`."""

    writer: Any

    def write(self, figures: EpochFigures, step: int) -> None:
        """Writes figures."""
        for name, value in _prefixed(figures).items():
            self.writer.add_scalar(name, value, step)


@dataclass
class ToFunction:
    """Writes with a function `(values, step)`."""

    function: Callable[[dict[str, Number], int], Any]

    def write(self, figures: EpochFigures, step: int) -> None:
        """Writes figures."""
        self.function(_prefixed(figures), step)


def writer_of(given: Any, *, begins: bool) -> tuple[Writer, str]:
    """Returns what writes to what the user has given, and what it is in messages.

    Args:
        given: A path that ends in `.csv`, an object with `add_scalar`, or a function.
        begins: Whether the training begins, so that a file with figures of another one is refused.

    Raises:
        UsageError: It is something else, or such a file.
        FileError: The file cannot be read, or its folder does not exist.
    """
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        if path.suffix.lower() != ".csv":
            raise UsageError(f"log_to: '{path}' does not end in .csv; give the path of a CSV file, {_OTHERS}")
        return ToFile(CsvFile(path, begins=begins)), f"'{path}'"
    if not isinstance(given, type):
        if callable(getattr(given, "add_scalar", None)):
            return ToTensorBoard(given), f"the {type(given).__name__}"
        if callable(given):
            return ToFunction(given), f"the function {getattr(given, '__qualname__', type(given).__name__)}"
    what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
    raise UsageError(f"log_to: got {what}; give the path of a CSV file, {_OTHERS}")


def _prefixed(figures: EpochFigures) -> dict[str, Number]:
    return {**{f"{PREFIX}{name}": value for name, value in figures.measured.items()}, **figures.given}


_OTHERS = "a SummaryWriter (anything with add_scalar(name, value, step)), or a function (values, step)"
