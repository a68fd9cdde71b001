"""Exceptions of compress-core.

Every message says what is wrong, where (a dotted module name or a config path), the value that was seen, and what to
do about it. All exceptions derive from `CompressionError`. Where a built-in exception describes the same kind of
mistake, the class derives from it too, so that `except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CompressionError(Exception):
    """Base class of all exceptions that compress-core raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a config.

    Attributes:
        path: Dotted path in the config, e.g. `compression.1.magnitude_sparsity.params.power`.
        message: What is wrong, the value seen, and the remedy.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(CompressionError, ValueError):
    """The config is wrong, contradicts itself, or has a value that can have no effect.

    Attributes:
        problems: All problems found, in the order of the config.
    """

    def __init__(self, problems: str | Problem | Sequence[Problem], *, path: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem(path, problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self._render())

    def _render(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems in the compression config:\n{lines}"

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class PluginError(CompressionError):
    """A plugin breaks the contract of `compress_core.contract.hookspecs`, or could not be loaded."""


class ModelError(CompressionError, ValueError):
    """The model cannot be compressed as it is."""


class DataError(CompressionError, ValueError):
    """Calibration data is missing, empty, or not accepted by the model."""


class DecidedFromDataError(DataError):
    """Within `plan_compression`: what was asked for is decided from data when the model is created."""


class UsageError(CompressionError, ValueError):
    """A method was called with an invalid value, or at a time when it cannot work."""


class StateError(CompressionError, ValueError):
    """A compression state or checkpoint is damaged, or does not fit the model, the config or the installed plugins."""


class TransformError(CompressionError, RuntimeError):
    """A weight transform cannot be added, failed while it ran, or returned something unusable."""


class ExportError(CompressionError, RuntimeError):
    """A model cannot be exported, or the exported file computes something else; no file is left."""


class RankError(CompressionError, RuntimeError):
    """Another process of a distributed training failed, or the processes differ in what has to be the same."""


class FileError(CompressionError, OSError):
    """A file cannot be read or written; the message names it and the cause. A file that was there is unchanged."""


class ExportFileError(ExportError, FileError):
    """A file of an export cannot be written; the message names it and the cause, and `errno` has its number."""
