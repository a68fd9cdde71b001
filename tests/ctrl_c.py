"""Ctrl-C in the middle of a test: Python's own handling of it, and a key press at an exact place.

The interpreter is told that the signal has come, instead of being sent one by the kernel: that would also interrupt
what libraries with threads of their own do in this process, which no test here is about. `tests/integration` sends
real signals, to processes of their own.
"""

from __future__ import annotations

import _thread
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def python_handles_it() -> Iterator[None]:
    """Context manager with Python's handler: a shell that starts us in the background switches Ctrl-C off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def press() -> None:
    """Lets Ctrl-C come now: the handler has run, or raised, when this returns."""
    _thread.interrupt_main(signal.SIGINT)
    for _ in range(2):  # Python looks for signals at the end of a loop's body
        pass
