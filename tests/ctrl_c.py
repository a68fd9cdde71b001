"""Ctrl-C in the middle of a test: Python's own handling of it, and a key press at an exact place."""

from __future__ import annotations

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
    signal.raise_signal(signal.SIGINT)
