"""`Runtime`: a program that executes exported files, as the core needs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress_core.errors import ExportError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Port:
    """An input of a file.

    Attributes:
        name: Its name.
        dtype: What it takes; float32 also for tensors of other floating-point types.
        shape: Its sizes; None for those that vary.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Executed:
    """An operator that a runtime has executed.

    Attributes:
        name: Its name in the runtime, which usually begins with that of a node of the file.
        nodes: Names of the nodes of the file that it computes, as far as the runtime says.
        operator: The runtime's operator or kernel.
        is_integer: Whether it multiplies integers.
        microseconds: How long it took in one run.
    """

    name: str
    nodes: tuple[str, ...]
    operator: str
    is_integer: bool
    microseconds: float


class RuntimeSession(ABC):
    """A file that is loaded in a runtime.

    Attributes:
        inputs: Its inputs, in order.
        outputs: Names of its outputs, in order.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Returns the outputs for these inputs."""

    @abstractmethod
    def executed(self, feeds: Mapping[str, Array]) -> list[Executed]:
        """Runs the file and returns the operators that were executed, from the runtime's own profile."""


class Runtime(ABC):
    """A program that executes exported files.

    Attributes:
        name: Its name for messages.
        package: The package that it needs, as it is imported.
        extra: The extra of compress-core that installs it.
        levels: The values of `optimized` that make a difference.
        profiles: Whether `RuntimeSession.executed` says how the file will be computed where it is deployed.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str]
    levels: ClassVar[tuple[bool, ...]] = (False, True)
    profiles: ClassVar[bool] = True

    def check_installed(self) -> None:
        """Checks that the runtime is installed.

        Raises:
            ExportError: It is not; the message says how to install it.
        """
        if find_spec(self.package) is None:
            raise ExportError(f"{self.name} is not installed: pip install 'compress-core[{self.extra}]'")

    @property
    @abstractmethod
    def label(self) -> str:
        """Name and version."""

    @abstractmethod
    def load(
        self, path: Path, *, optimized: bool = True, threads: int | None = None, profile: bool = False
    ) -> RuntimeSession:
        """Loads a file.

        Args:
            path: The file.
            optimized: Whether the runtime may optimize the graph; a runtime that always does ignores it.
            threads: Number of threads; None for the number that torch uses.
            profile: Whether `executed` will be called.
        """
