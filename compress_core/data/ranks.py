"""Several processes that compress the same model: what one reads all read, and what fails on one fails on all.

Each process reads its own part of the data, and each gets the batches of all, so every algorithm computes on every
process what a single process would have computed from all the data, without knowing of processes. At the end the
results are compared, and where roundings differ, those of rank 0 hold.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compress_core.data.structures import moved, tensors_of
from compress_core.errors import RankError
from compress_core.torch_internals import tree_leaves

_NOTHING_LEFT = "no batch left"


@dataclass
class _Section:
    """Work that all processes do; `told` means that this process waits for the others, or they for it."""

    told: bool = False


@dataclass(frozen=True)
class _Failure:
    """What a process sends in place of a value."""

    kind: str
    message: str


_section: _Section | None = None
_is_alone = False


def number_of_ranks() -> int:
    """Returns the number of processes that work together now; 1 outside of `together`."""
    return 1 if _section is None else _world_size()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_told() -> bool:
    """Returns whether processes have exchanged anything in this section."""
    return _section is not None and _section.told


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context manager for what all processes do: an error on one, Ctrl-C included, is raised on all.

    Others are told as soon as they exchange something: batches, or results. Within another one it does nothing.

    Raises:
        RankError: Another process failed.
    """
    global _section  # noqa: PLW0603 - there is one group of processes
    if _is_alone or _section is not None or _world_size() == 1:
        yield
        return
    _section = _Section()
    try:
        yield
    except RankError:
        raise
    except BaseException as error:
        if _section.told:
            _gather(_Failure(type(error).__name__, str(error)))
        raise
    finally:
        _section = None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Context manager in which this process does everything by itself, as one that trains a model of its own."""
    global _section, _is_alone
    before, _section, _is_alone = (_section, _is_alone), None, True
    try:
        yield
    finally:
        _section, _is_alone = before


def is_alone() -> bool:
    """Returns whether this is within `alone`."""
    return _is_alone


def exchange(what: str, value: Any) -> list[Any]:
    """Returns the values of all processes, by rank.

    Args:
        what: What is exchanged, the same on all processes.
        value: Anything that can be pickled, on the CPU.

    Raises:
        RankError: Another process failed, or exchanges something else.
    """
    if _section is not None:
        _section.told = True
    found = _gather((what, value))
    failures = [(rank, entry) for rank, entry in enumerate(found) if isinstance(entry, _Failure)]
    if failures:
        rank, failure = failures[0]
        raise RankError(f"rank {rank} of {len(found)} failed, so all have stopped: {failure.kind}: {failure.message}")
    kinds = [entry[0] for entry in found]
    if len(set(kinds)) > 1:
        raise RankError(
            f"the ranks do different things at the same time: {dict(enumerate(kinds))}; call create_compressed_model "
            "and the controller's methods that change the model in the same order on all of them"
        )
    return [entry[1] for entry in found]


def _gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def shared_batches(own: Iterator[Any]) -> Iterator[Any]:
    """Yields the batches of all processes: the first of each by rank, then the second of each, and so on.

    Where all give the same batch, it is yielded once: the loaders are not sharded. A process that has none left, or
    never had any, gets those of the others.

    Raises:
        RankError: Another process failed.
    """
    if number_of_ranks() == 1:
        yield from own
        return
    assert _section is not None
    _section.told = True  # from here on the others wait
    while True:
        batch = next(own, _NOTHING_LEFT)
        device = next((tensor.device for tensor in tensors_of(batch)), None)
        given = exchange("calibration batches", moved(batch, torch.device("cpu")))
        left = [entry for entry in given if not (isinstance(entry, str) and entry == _NOTHING_LEFT)]
        if not left:
            return
        if len(left) == len(given) and len({fingerprint(entry) for entry in left}) == 1:
            left = left[:1]
        for entry in left:
            yield entry if device is None else moved(entry, device)


def fingerprint(value: Any) -> str:
    """Returns a hash of tensors, in any nesting, bit for bit; of other leaves their `repr` counts."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in _parts(value):
        if not isinstance(leaf, torch.Tensor):
            digest.update(repr(leaf).encode())
            continue
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        # A subclass, such as the part of a sharded tensor that this process has, may differ between processes.
        if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout == torch.strided and not leaf.is_quantized:
            plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """Yields the leaves of a value; of an object that torch takes for a leaf the tensors: its `repr` shortens them."""
    for leaf in tree_leaves(value):
        tensors = [] if isinstance(leaf, torch.Tensor) else [*tensors_of(leaf)]
        yield from tensors or [leaf]


def require_same(what: str, values: Mapping[str, str], remedy: str) -> None:
    """Refuses values that differ between processes.

    Args:
        what: What the values are, for messages.
        values: Hash of each value by its name.
        remedy: What to do about it.

    Raises:
        RankError: On all processes; the message names the first value that differs, and the ranks.
    """
    found = exchange(what, dict(values))
    for name in dict.fromkeys(name for entry in found for name in entry):
        different = [rank for rank, entry in enumerate(found) if entry.get(name) != found[0].get(name)]
        if different:
            raise RankError(f"{what} differ: '{name}' of rank {different[0]} is not that of rank 0; {remedy}")


def take_first(what: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Sets tensors that differ between processes to the values of rank 0, and returns their names.

    Raises:
        RankError: The processes have other tensors, or other shapes.
    """
    mine = {name: (tuple(tensor.shape), str(tensor.dtype), fingerprint(tensor)) for name, tensor in tensors.items()}
    found = exchange(what, mine)
    for rank, entry in enumerate(found):
        if {n: e[:2] for n, e in entry.items()} != {n: e[:2] for n, e in found[0].items()}:
            raise RankError(f"{what}: rank {rank} has other tensors than rank 0, or of other shapes")
    different = [name for name in mine if any(entry[name] != found[0][name] for entry in found)]
    if different:
        sent = different if dist.get_rank() == 0 else []
        first = exchange(f"{what}, values", {name: tensors[name].detach().cpu() for name in sent})[0]
        with torch.no_grad():
            for name in different:
                tensors[name].copy_(first[name])
    return different
