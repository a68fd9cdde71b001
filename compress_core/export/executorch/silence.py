"""Imports and calls ExecuTorch without what it prints and logs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

import torch

from compress_core.errors import ExportError
from compress_core.torch_internals import tree_map

# Among them that of torch's trees, which warns of classes that torchao registers.
_NOISY = ("torch.export", tree_map.__module__, "torchao", "executorch", "root")
_MODULES = (
    "executorch.exir",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
    # Registers the operators that are not delegated, such as dequantize_per_channel.
    "executorch.kernels.quantized",
    "executorch.runtime",
)


def import_executorch() -> None:
    """Imports ExecuTorch, which registers the operators of `torch.ops.quantized_decomposed`.

    Raises:
        ExportError: It does not work with this version of torch.
    """
    try:
        with quiet():
            for name in _MODULES:
                importlib.import_module(name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"ExecuTorch is installed, but cannot be used with torch {torch.__version__}: {lines[0]}. Each version of "
            "ExecuTorch is made for one of torch (1.4 and 1.5 for 2.13): "
            "pip install -U 'compress-core[executorch]' torch"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager in which neither ExecuTorch nor torchao warn, log, or print."""
    # They log through the root logger as well.
    noisy = [logging.getLogger(None if name == "root" else name) for name in _NOISY]
    before = [log.level for log in noisy]
    for log in noisy:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _no_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, before, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Context manager that yields a list, which is filled with the lines that the runtime writes to standard error."""
    lines: list[str] = []
    sys.stderr.flush()
    said = io.StringIO()  # the runtime logs through Python, its libraries do not
    with tempfile.TemporaryFile() as file, contextlib.redirect_stderr(said):
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += [*said.getvalue().splitlines(), *file.read().decode(errors="replace").splitlines()]


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    with captured(), contextlib.redirect_stdout(None):
        yield
