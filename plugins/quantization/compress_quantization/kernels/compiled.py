"""The kernels as torch's compiler makes them, one for each kind of tensor and task.

`torch.compile` would look up, for each call, which of its compiled variants fits: four times as long as such a call
takes otherwise. Here that is known beforehand. A kernel is traced once with sizes that stand for any, and called.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from compress_core.errors import UsageError
from compress_core.torch_internals import TorchFunctionDisabled, compile_graph, import_compiler

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "COMPRESS_QUANTIZATION_KERNELS"
"""`auto` (default): kernels are compiled where that works. `eager`: none is compiled. `compiled`: that it does not work
is an error, instead of a warning and slower kernels."""

_MODES = ("auto", "eager", "compiled")

Kernel = Callable[..., tuple[torch.Tensor, ...]]
Example = tuple[torch.Size | tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor that a kernel is traced with. Sizes that are equal stay equal, others may be any."""


class _State:
    """What this process knows about compiling."""

    def __init__(self) -> None:
        self.mode = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        self.enabled = self.mode != "eager"
        self.works = True
        self.kernels: dict[Any, Kernel] = {}
        self.lock = threading.Lock()
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


def kernel_count() -> int:
    """Returns how many kernels this process has compiled or loaded."""
    return len(_state.kernels)


def find(key: tuple[Any, ...], function: Kernel, examples: Callable[[], list[Example]]) -> Kernel | None:
    """Returns `function` compiled, or None where there is no compiler: the first call finds out.

    Args:
        key: What the kernel is specialized on; `function` is determined by it. First comes the device, with its
            index: what a compiler writes allocates and runs on that very one.
        function: Takes tensors, and returns a tuple of new tensors.
        examples: Returns what to trace with, when the kernel has to be made.
    """
    full_key = (*key, torch.get_num_threads())
    kernel = _state.kernels.get(full_key)
    if kernel is None:
        with _state.lock:
            kernel = _state.kernels.get(full_key) or _made(function, examples(), key[0])
            if kernel is not None:
                _state.kernels[full_key] = kernel
    return kernel


def _made(function: Kernel, examples: list[Example], device: torch.device) -> Kernel | None:
    try:
        import_compiler()  # before modes change: some versions cannot otherwise
        # What surrounds the call, such as autocast, a default device or a mode of the user's, is not the kernel's.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            TorchFunctionDisabled(),
        ):
            inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in examples]
            kernel = compile_graph(function, inputs)
            kernel(*inputs)  # some versions of torch write code that fails only when it runs
            return kernel
    except Exception as error:  # whatever a missing or broken tool chain raises: there is no common base
        if _state.mode == "compiled":
            raise
        _give_up(error)
        return None


def _give_up(error: Exception) -> None:
    _state.works = False
    if next(_state.failures) == 0:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(
            "fake-quantize kernels cannot be compiled (%s: %s); eager ones are used, which are slower. "
            "Install a C++ compiler or another version of torch, or set %s=eager",
            type(error).__name__,
            reason[0][:200],
            ENVIRONMENT_VARIABLE,
        )
