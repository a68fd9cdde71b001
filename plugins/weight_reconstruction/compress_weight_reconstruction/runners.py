"""Forwards that pause: each runs in a thread of its own, and only one thread at a time runs at all.

Reconstruction has to stop every forward at a layer, solve for the layer's weight, and go on. The forward is the user's
code, so it cannot be cut into pieces: it runs in a thread that waits where it has to stop. This costs one forward for
each batch and model, where running up to each layer again would cost as many forwards as there are layers.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from compress_core.torch_internals import function_mode_at, function_mode_count, pop_function_mode, push_function_mode


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class _Abandoned(BaseException):
    """Ends a waiting forward; not an Exception, so that no model takes it for an error of its own."""


class Surroundings:
    """What torch keeps for each thread, as it is in the thread that creates this: it holds in the runners as well."""

    def __init__(self) -> None:
        self._modes = [function_mode_at(index) for index in range(function_mode_count())]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]
        self._device = torch.cuda.current_device() if _uses_cuda() else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Context manager in which the present thread has them; without gradients."""
        with contextlib.ExitStack() as stack:
            if self._device is not None:
                stack.enter_context(torch.cuda.device(self._device))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            stack.enter_context(torch.no_grad())
            for mode in self._modes:
                push_function_mode(mode)
                stack.callback(pop_function_mode)
            yield


class _Generators:
    """The states of torch's global random generators for one runner: models that draw numbers draw them undisturbed."""

    def __init__(self) -> None:
        self._read()

    def _read(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Context manager in which the global generators have the states of this runner."""
        outer = _Generators()
        self._set()
        try:
            yield
        finally:
            self._read()
            outer._set()

    def _set(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@dataclass
class Stop:
    """A place at which a forward waits.

    Attributes:
        key: What is reached: the name of a weight or of a batch norm.
        value: What is needed of the forward there; whoever has read it sets this to None to free the memory.
    """

    key: str
    value: Any


class Runner:
    """One forward that can be paused.

    Args:
        forward: The function to run, which gets this runner, to call `pause`.
        surroundings: What holds in its thread.
    """

    def __init__(self, forward: Callable[[Runner], Any], surroundings: Surroundings) -> None:
        self._forward, self._surroundings = forward, surroundings
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._generators = _Generators()
        self._context = contextvars.copy_context()
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._thread: threading.Thread | None = None
        self.stop: Stop | None = None
        self.result: Any = None
        self.is_finished = False

    def advance(self) -> Stop | None:
        """Lets the forward run up to its next stop, and returns that; None at the end.

        An exception of the forward is raised here.
        """
        self.stop = None
        with self._generators.current():
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._context.run, args=(self._run,), name="weight reconstruction", daemon=True
                )
                self._thread.start()
            else:
                self._go.release()
            self._waits.acquire()
        if self.is_finished:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self.stop

    def pause(self, key: str, value: Any) -> None:
        """Waits at a stop until `advance` is called again; only in the forward."""
        if self._is_abandoned:
            raise _Abandoned
        self.stop = Stop(key, value)
        del value
        self._waits.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _Abandoned

    def close(self) -> None:
        """Ends the forward where it is; afterwards its thread does not exist any more."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._is_abandoned = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(timeout=60)

    def _run(self) -> None:
        try:
            with self._surroundings.entered():
                self.result = self._forward(self)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        self.is_finished, self.stop = True, None
        self._waits.release()


@contextlib.contextmanager
def closing(runners: list[Runner]) -> Iterator[None]:
    """Context manager that ends all forwards on exit, whether they have been run to their end or not."""
    try:
        yield
    finally:
        for runner in runners:
            runner.close()
