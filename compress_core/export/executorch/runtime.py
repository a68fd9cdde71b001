"""Runs programs in ExecuTorch's runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from compress_core.errors import ExportError
from compress_core.export.agreement import RunError
from compress_core.export.executorch.silence import captured


def label() -> str:
    """Returns name and version of the runtime."""
    return f"ExecuTorch {version('executorch')} (XNNPACK)"


class Loaded:
    """A program that ExecuTorch's runtime has loaded."""

    def __init__(self, program: bytes) -> None:
        """Loads a program.

        Raises:
            ExportError: The runtime cannot load it.
        """
        from executorch.runtime import Runtime  # noqa: PLC0415 - an extra

        with captured() as lines:
            try:
                self._program: Any = Runtime.get().load_program(program)
                self._method: Any = self._program.load_method("forward")
            except Exception as error:
                failure: Exception | None = error
            else:
                failure = None
        if failure is not None:
            raise ExportError(f"{label()} cannot load what was exported: {_first_line(failure, lines)}") from failure

    def run(self, inputs: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
        """Returns what the program computes; the tensors are copies.

        Args:
            inputs: The input tensors.
            size: Number of samples, for the error.

        Raises:
            RunError: The runtime fails.
        """
        with captured() as lines:
            try:
                # The runtime reads the memory of a tensor as if it was contiguous.
                made = [entry.clone() for entry in self._method.execute([one.contiguous() for one in inputs])]
            except Exception as error:
                failure: Exception | None = error
            else:
                return made
        assert failure is not None
        message = f"{label()} cannot run what was exported on a batch of {size}: {_first_line(failure, lines)}"
        raise RunError(size, message) from failure


def _first_line(error: Exception, logged: Sequence[str]) -> str:
    """Returns an error in a line, with what the runtime has logged, which says more than its error."""
    said = [line.partition("] ")[2] or line for line in logged if "cpuinfo" not in line]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{first} ({said[0]})" if said else first
