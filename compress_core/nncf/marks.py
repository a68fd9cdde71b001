"""What NNCF's users write into their models: it runs, and does what it can here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)
_told: set[str] = set()


def _tell(what: str, instead: str) -> None:
    """Warns once for each name, because these are called in every forward."""
    if what not in _told:
        _told.add(what)
        logger.warning("%s has no effect here; %s", what, instead)


@contextlib.contextmanager
def no_nncf_trace() -> Iterator[None]:
    """Context manager without effect, with one warning: what is computed in it is seen, and may be quantized."""
    _tell("no_nncf_trace()", "name what must stay as it is in ignored_scopes")
    yield


def disable_tracing(method: F) -> F:
    """Returns the method as it is, with one warning; see `no_nncf_trace`."""
    _tell("disable_tracing()", "name the module in ignored_scopes")
    return method


def register_operator(name: str | None = None) -> Callable[[F], F]:
    """Decorator that returns the function as it is: calls of torch's functions in it are seen without registration."""
    del name
    return lambda function: function


def nncf_model_input(tensor: T) -> T:
    """Returns the tensor: the arguments of forward are the inputs."""
    return tensor


def nncf_model_output(tensor: T) -> T:
    """Returns the tensor: what forward returns are the outputs."""
    return tensor
