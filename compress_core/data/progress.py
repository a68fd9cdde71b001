"""Progress bars of whatever takes long: what is running, how far it is, and how long it will take."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm

from compress_core.data.ranks import is_first_rank
from compress_core.errors import UsageError

T = TypeVar("T")

ENVIRONMENT_VARIABLE = "COMPRESS_CORE_PROGRESS"

# What takes less than this shows nothing.
_DELAY_S = 0.5

_shown: bool | None = None


def show_progress(shown: bool | None) -> None:
    """Turns progress bars on or off, for this process.

    They are on stderr: a line for each thing that is running, which is removed when it ends.

    Args:
        shown: True or False; None for the default, which is what the environment variable `COMPRESS_CORE_PROGRESS` says
            (`1` or `0`), and without it whether stderr is a terminal or a notebook. Of several processes only the
            first one shows any, whatever is set.

    Raises:
        UsageError: It is something else.
    """
    global _shown  # noqa: PLW0603 - there is one stderr
    if shown is not None and not isinstance(shown, bool):
        raise UsageError(f"show_progress: takes True, False or None, got {shown!r}")
    _shown = shown


def is_shown() -> bool:
    """Returns whether progress bars are shown now; see `show_progress`.

    Raises:
        UsageError: The environment variable has another value than 0 or 1.
    """
    if not is_first_rank():
        return False
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise UsageError(f"the environment variable {ENVIRONMENT_VARIABLE}={wanted!r}: use 0 or 1")
    if _shown is not None:
        return _shown
    return wanted == "1" if wanted else _is_seen(sys.stderr)


def _is_seen(stream: Any) -> bool:
    """Returns whether somebody looks at a stream now: a terminal, or the output of a notebook's cell."""
    if type(stream).__module__.partition(".")[0] == "ipykernel":
        return True
    try:
        return bool(stream is not None and stream.isatty())
    except (AttributeError, ValueError):  # a stream that somebody has put there, or one that is closed
        return False


class ProgressBar:
    """How far something is; made by `progress_bar`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, count: float = 1) -> None:
        """Says that so many more are done."""
        self._bar.update(count)

    def note(self, **values: Any) -> None:
        """Shows values behind the bar."""
        self._bar.set_postfix(**values)


@contextlib.contextmanager
def progress_bar(
    what: str, total: float | None = None, *, unit: str = "step", done: float = 0, leave: bool = False
) -> Iterator[ProgressBar]:
    """Context manager with a progress bar, which is gone at its end, however it ends.

    One within another takes a line of its own.

    Args:
        what: What is running, such as "ranges of activations".
        total: How many there will be, if that is known.
        unit: What is counted.
        done: How many have been done before.
        leave: Whether the bar stays at the end.
    """
    bar = tqdm(
        desc=what,
        total=total,
        unit=unit,
        initial=done,
        leave=leave,
        delay=_DELAY_S,
        disable=not is_shown(),
        dynamic_ncols=True,
    )
    try:
        yield ProgressBar(bar)
    finally:
        bar.close()


def progress(items: Iterable[T], what: str, *, total: float | None = None, unit: str = "step") -> Iterator[T]:
    """Yields items, and shows how many have been.

    Args:
        items: The items.
        what: What is running, such as "ranking search".
        total: Their number; by default their length, if they have one.
        unit: What one of them is.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(what, total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
