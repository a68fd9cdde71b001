"""Several processes that compress the same model: what one reads all read, and what fails on one fails on all.

Each process reads its own part of the data, and each gets the batches of all, so every algorithm computes on every
process what a single process would have computed from all the data, without knowing of processes. At the end the
results are compared, and where roundings differ, those of rank 0 hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compress_core.data.roll_call import RollCall
from compress_core.data.structures import moved, tensors_of
from compress_core.errors import RankError
from compress_core.torch_internals import default_store, tree_leaves
from compress_core.transforms.interrupts import interrupts_held

_NOTHING_LEFT = "no batch left"


@dataclass
class _Section:
    """A call that all processes make.

    Attributes:
        call: What is called, for messages.
        joined: Whether all processes have begun it, so that each has to tell the others how it ends.
        over: Whether they know how it has ended.
        exchanged: Whether they have given each other values.
    """

    call: str
    joined: bool = False
    over: bool = False
    exchanged: bool = False


@dataclass(frozen=True)
class _Failure:
    """What a process sends in place of a value."""

    kind: str
    message: str


_section: _Section | None = None
_is_alone = False
_meetings: RollCall | None = None
# Weakly: torch destroys its groups itself, and one that outlives the others can abort the process at its end.
_own_group: weakref.ref[dist.ProcessGroup] | None = None


def number_of_ranks() -> int:
    """Returns the number of processes that work together now; 1 outside of `together`."""
    return 1 if _section is None else _world_size()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Returns whether this process is the one of several that writes files and shows progress."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def has_exchanged() -> bool:
    """Returns whether processes have given each other values in this section."""
    return _section is not None and _section.exchanged


@contextlib.contextmanager
def together(call: str, *, lazily: bool = False) -> Iterator[None]:
    """Context manager for a call that all processes make: an error on one, Ctrl-C included, is raised on all.

    It begins when all have come, and should end with `settle`. Within another one it does nothing.

    Args:
        call: What is called, the same on all processes.
        lazily: Whether to wait for the others only if there is a `join` or an exchange.

    Raises:
        RankError: Another process failed, called something else, or did not come within the group's timeout.
    """
    global _section  # noqa: PLW0603 - there is one group of processes
    if _is_alone or _section is not None or _world_size() == 1:
        yield
        return
    _section = section = _Section(call)
    try:
        if not lazily:
            join()
        yield
        settle()
    except RankError:
        raise
    except BaseException as error:
        _tell(section, error)
        raise
    finally:
        _section = None


def join() -> None:
    """Waits until all processes have begun this call; does nothing where they have, or outside of `together`.

    Raises:
        RankError: Another process failed, calls something else, or did not come within the group's timeout.
    """
    section = _section
    if section is None or section.joined or _world_size() == 1:
        return
    meetings = _current_meetings()
    try:
        calls = meetings.meet(section.call)
    except BaseException:
        section.joined, section.over = meetings.begun, not meetings.begun
        raise
    section.joined = True
    _refuse_different(calls)


def settle() -> None:
    """Waits until all processes have done their part of a call, so that what they have done can stay.

    The last thing to do in it: afterwards no process learns of another's error.

    Raises:
        RankError: Another process failed.
    """
    if _section is not None and _section.joined and not _section.over:
        _values("the end of " + _section.call, None, last=True)


def _tell(section: _Section, error: BaseException) -> None:
    """Tells the others of an error, unless they know how the call ended."""
    if section.over:
        return
    section.over = True
    if section.joined:
        _gather(_Failure(type(error).__name__, str(error)))
    else:
        _current_meetings().fail(section.call, error)


def _current_meetings() -> RollCall:
    """Returns the meetings of the present group; `destroy_process_group` ends them."""
    global _meetings, _own_group
    store = default_store()
    if _meetings is None or _meetings.store is not store:
        _meetings, _own_group = RollCall(store, dist.get_rank(), dist.get_world_size()), None
    return _meetings


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
    join()
    if _section is not None:
        _section.exchanged = True
    return _values(what, value)


def _values(what: str, value: Any, *, last: bool = False) -> list[Any]:
    with interrupts_held():  # by Ctrl-C between two collectives the processes would get out of step
        found = _gather((what, value))
        failures = [(rank, entry) for rank, entry in enumerate(found) if isinstance(entry, _Failure)]
        if _section is not None:
            _section.over = last or bool(failures)
    if failures:
        rank, failure = failures[0]
        raise RankError(f"rank {rank} of {len(found)} failed, so all have stopped: {failure.kind}: {failure.message}")
    _refuse_different([entry[0] for entry in found])
    return [entry[1] for entry in found]


def _refuse_different(kinds: list[str]) -> None:
    if len(set(kinds)) > 1:
        raise RankError(
            f"the ranks do different things at the same time: {dict(enumerate(kinds))}; call create_compressed_model "
            "and the controller's methods that change the model in the same order on all of them"
        )


def _gather(value: Any) -> list[Any]:
    # Pickled before anything is sent: an error is then one of this process alone, of which it can tell the others.
    sent = pickle.dumps(value)
    found: list[Any] = [None] * dist.get_world_size()
    with interrupts_held():
        try:
            dist.all_gather_object(found, sent, group=_group())
        except RuntimeError as error:
            if _section is not None:
                _section.over = True  # there is nobody to tell
            raise RankError(f"rank {dist.get_rank()} has lost the others; one has ended or hangs: {error}") from error
    return [pickle.loads(entry) for entry in found]


def _group() -> dist.ProcessGroup | None:
    """Returns a group for CPUs that nobody else uses, so that nothing of the user's comes between."""
    global _own_group  # noqa: PLW0603 - there is one group of processes
    if not dist.is_gloo_available():
        return None
    meetings = _current_meetings()
    group = None if _own_group is None else _own_group()
    if group is None:
        group = dist.new_group(backend="gloo", timeout=meetings.time_limit)
        assert group is not None
        _own_group = weakref.ref(group)
    return group


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
