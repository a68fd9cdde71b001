"""Finds what would make a GPU and its host wait for one another, on any machine.

A training step that never does this is queued on the GPU while the one before still runs. What waits: reading a value
(`.item()`, `if tensor`, `.tolist()`), operators whose result has a size that depends on values (`nonzero`, indexing
with booleans), copies to the host, and copies from it (`torch.tensor([1.0], device="cuda")`), because the memory of
Python numbers is not pinned.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# Operators of which every kernel for CUDA waits, or checks its result on the host.
WAITING = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "lift_fresh"),
        *("nonzero", "argwhere", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
        *("histc", "_sparse_coalesce", "_coalesce", "tensor_split"),
        *("linalg_svd", "linalg_eigh", "linalg_inv", "linalg_cholesky", "linalg_solve", "linalg_qr"),
    )
)
# Methods that show in no profile, or only as an operator that does not say where it was called.
_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
_SKIPPED = (str(Path(torch.__file__).parent), __file__)


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Yields a list that is complete behind the block: what in it would wait, with the place where that is known."""
    found: list[str] = []
    with _telling_methods(found), profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield found
    found += sorted({event.name for event in profiler.events() if event.name in WAITING})


@contextmanager
def _telling_methods(found: list[str]) -> Iterator[None]:
    """Lets methods of tensors tell who calls them."""
    own = {name: torch.Tensor.__dict__.get(name) for name in (*_METHODS, "to")}
    for name in _METHODS:
        setattr(torch.Tensor, name, _telling(name, getattr(torch.Tensor, name), found))
    torch.Tensor.to = _telling("to", torch.Tensor.to, found)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, method in own.items():
            delattr(torch.Tensor, name) if method is None else setattr(torch.Tensor, name, method)


def _telling(name, method, found):
    def call(tensor, *args, **kwargs):
        if name != "to" or _is_host(*args, **kwargs):
            found.append(f"{name}() in {_place()}")
        return method(tensor, *args, **kwargs)

    return call


def _is_host(*args, **kwargs):
    targets = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, torch.device))]
    return any(torch.device(target).type == "cpu" for target in targets)


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(_SKIPPED)]
    return f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].name}"
