"""The kernels as torch.compile makes them, one for each kind of tensor and task."""

from __future__ import annotations

import itertools
import logging
import os
import types
from collections.abc import Callable
from typing import Any

import torch

from compress_core.errors import UsageError

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "COMPRESS_QUANTIZATION_KERNELS"
"""`auto` (default): kernels are compiled where that works. `eager`: none is compiled. `compiled`: that it does not work
is an error, instead of a warning and slower kernels."""

_MODES = ("auto", "eager", "compiled")

Kernel = Callable[..., Any]


class _State:
    """What this process knows about compiling."""

    def __init__(self) -> None:
        self.mode = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        self.enabled = self.mode != "eager"
        self.works = True
        self.kernels: dict[Any, Kernel] = {}
        self.failures = itertools.count()  # next() is atomic, so that of several threads one logs


_state = _State()


def set_compiled(enabled: bool) -> bool:
    """Switches compiled kernels on or off for this process, and returns what was set before.

    Args:
        enabled: False for eager kernels. True lets compiling be tried again if it failed before.
    """
    before = _state.enabled and _state.works
    _state.enabled = enabled
    _state.works = True
    return before


def is_available() -> bool:
    """Tells whether kernels may be compiled: not switched off, and compiling has not failed in this process.

    Raises:
        UsageError: The environment variable has an unknown value.
    """
    if _state.mode not in _MODES:
        raise UsageError(f"the environment variable {ENVIRONMENT_VARIABLE}={_state.mode!r}: use one of {_MODES}")
    return _state.enabled and _state.works


def run(function: Kernel, key: tuple[Any, ...], *args: Any) -> tuple[bool, Any]:
    """Runs `function` compiled.

    Args:
        function: One of `formulas`.
        key: What a kernel may be specialized on. Each key gets a function with a code object of its own, because
            torch.compile counts recompilations for each code object and silently stops compiling after the eighth.
        *args: Its arguments; it may have written to tensors among them even when it failed.

    Returns:
        Whether it ran, and what it returned. It does not run where there is no compiler: the first call finds out.
    """
    full_key = (function, key, torch.is_inference_mode_enabled(), torch.get_num_threads())
    kernel = _state.kernels.get(full_key)
    if kernel is None:
        kernel = _state.kernels.setdefault(full_key, torch.compile(_clone(function), dynamic=True, fullgraph=True))
    try:
        return True, kernel(*args)
    except Exception as error:  # whatever a missing or broken tool chain raises: there is no common base
        if _state.mode == "compiled":
            raise
        _give_up(error)
        return False, None


def _give_up(error: Exception) -> None:
    _state.works = False
    if next(_state.failures) == 0:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "fake-quantize kernels cannot be compiled (%s: %s); eager ones are used, which are slower. "
            "Install a C++ compiler, or set %s=eager",
            type(error).__name__,
            reason[0][:200],
            ENVIRONMENT_VARIABLE,
        )


def _clone(function: Kernel) -> Kernel:
    assert isinstance(function, types.FunctionType)
    clone = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone
