"""All or nothing: whatever fails while a model is compressed, it is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import SkipTest

import torch
from torch import nn

from compress_core.contract.hookspecs import hookimpl
from compress_core.testing.case import Case, fail, require
from compress_core.testing.fingerprint import fingerprint
from compress_core.testing.tags import check
from compress_core.torch_internals import global_hooks

_LET_PASS = (
    "Let exceptions pass in compress_calibrate and compress_commit: catch only what you can mend, and never a bare "
    "`except:` or `except BaseException:`."
)
# How many forwards of an initialization fail in turn: evenly spread, if there are more.
_FORWARDS = 5


@check()
def check_rolls_back_from_every_hook(case: Case) -> None:
    """An exception or Ctrl-C at any hook leaves model and random generators as they were, bit for bit."""
    for hook in ("compress_configure", "compress_plan", "compress_observe", "compress_commit", "compress_calibrate"):
        _require_rollback(case, KeyboardInterrupt(), hook)
    # Before these, everything has been done that there is to undo: both kinds of exceptions.
    state = case.compressed()[0].get_compression_state()
    for error in (RuntimeError("injected"), KeyboardInterrupt()):
        _require_rollback(case, error, "compress_initialize")
        _require_rollback(case, error, "compress_load_state", state)


@check()
def check_rolls_back_from_every_forward(case: Case) -> None:
    """An exception in the n-th forward of initialization leaves everything as it was, whatever n.

    A forward that is only tried, such as one with fake tensors, may fail with an exception without consequences.
    """
    model = case.model()
    counter = _CountingForward(model, 0, ValueError())
    handle = model.register_forward_pre_hook(counter)
    case.compressed(model)
    handle.remove()
    forwards = -counter.left
    if not forwards:
        raise SkipTest("initialization with this config runs no forward")
    for count in sorted({1 + round(n * (forwards - 1) / (_FORWARDS - 1)) for n in range(_FORWARDS)}):
        interrupted = _rolls_back(case, KeyboardInterrupt(), f"forward {count}", failing_forward=count)
        require(interrupted, f"Ctrl-C in forward {count} did not come through", _LET_PASS)
    swallowed = not _rolls_back(case, ValueError("injected"), "forward 1", failing_forward=1)
    require(not swallowed, "the model failed from the first forward on, and nobody cared", _LET_PASS)


@check(needs=["needs_data"])
def check_rolls_back_from_the_loader(case: Case) -> None:
    """An exception raised by the data loader leaves everything as it was, and is not swallowed."""
    batches = list(case.loader or ())
    errors: list[tuple[int, BaseException]] = [(count, OSError("injected")) for count in range(len(batches))]
    for count, error in [*errors, (len(batches) - 1, KeyboardInterrupt())]:
        loader = _FailingLoader(batches, count, error)
        reached = _rolls_back(case, error, f"batch {count}", loader=loader)
        require(reached or not loader.failed, f"the data loader failed at batch {count}, and nobody cared", _LET_PASS)
        # A loader that is not read so far has nothing to fail with.
        if not reached and count == 0:
            raise SkipTest("initialization with this config does not read the loader")


def _failing_observer(hook: str, error: BaseException) -> object:
    if hook == "compress_configure":

        def fail(self: object, algorithm: Any) -> None:
            raise error

    elif hook in {"compress_observe", "compress_initialize"}:

        def fail(self: object, model: nn.Module) -> None:  # type: ignore[misc]
            next(model.parameters()).data.add_(1)
            raise error

    else:

        def fail(self: object, model: nn.Module, algorithm: Any) -> None:  # type: ignore[misc]
            next(model.parameters()).data.add_(1)
            raise error

    return type("FailingObserver", (), {hook: hookimpl(fail)})()


class _CountingForward:
    """Fails at the n-th call of a model's forward, and with an exception at all later ones; copies do not count."""

    def __init__(self, model: nn.Module, limit: int, error: BaseException) -> None:
        self.model = model
        self.left = limit
        self.limit = limit
        self.error = error

    def __deepcopy__(self, memo: Any) -> _CountingForward:
        return self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is not self.model:
            return
        self.left -= 1
        if self.limit and (self.left == 0 or (self.left < 0 and isinstance(self.error, Exception))):
            torch.rand(3)
            raise self.error


class _FailingLoader:
    """Fails instead of giving the n-th batch."""

    def __init__(self, batches: Sequence[Any], limit: int, error: BaseException) -> None:
        self.batches = batches
        self.limit = limit
        self.error = error
        self.failed = False

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: self.limit]
        torch.rand(3)
        self.failed = True
        raise self.error


def _require_rollback(case: Case, error: BaseException, hook: str, state: Mapping[str, Any] | None = None) -> None:
    came = _rolls_back(case, error, hook, observer=_failing_observer(hook, error), state=state)
    require(came, f"{type(error).__name__} at {hook}() did not come through", _LET_PASS)


def _rolls_back(
    case: Case,
    error: BaseException,
    where: str,
    *,
    observer: object = None,
    failing_forward: int = 0,
    loader: Any = None,
    state: Mapping[str, Any] | None = None,
) -> bool:
    """Returns whether the error came through; if it did, the model is held against what it was."""
    model = case.model()
    if failing_forward:
        model.register_forward_pre_hook(_CountingForward(model, failing_forward, error))
    before = {**fingerprint(model), "global hooks": global_hooks()}
    observers = [] if observer is None else [observer]
    try:
        if state is None:
            case.compressed(model, loader=loader, observers=observers)
        else:
            case.resumed(state, model, observers)
    except BaseException as raised:
        if not any(cause is error for cause in _causes(raised)):
            raise
        after = {**fingerprint(model), "global hooks": global_hooks()}
        if after != before:
            fail(
                f"after {type(error).__name__} at {where} {_differences(before, after)}",
                "Change nothing but modules, parameters, buffers, attributes and hooks of the model, which the core "
                "puts back; what you change elsewhere (globals, nested lists), undo in try/finally.",
            )
        return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from; an error in a forward is often explained twice."""
    while error is not None:
        yield error
        error = error.__cause__


def _differences(before: Any, after: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return "; ".join(_differences(before.get(key), after.get(key), f"{path}.{key}") for key in keys)
    return f"{path[1:]} is not as it was"
