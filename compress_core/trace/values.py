"""Tracks which value each tensor holds, through writes in place and memory that tensors share."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch

from compress_core.torch_internals import FakeTensor, FakeTensorMode, is_view, storage_identity
from compress_core.trace.graph import ForwardTrace, Ref, Value, ValueId, inputs_with_paths, tensors_with_paths
from compress_core.transforms.places import Path

# A tensor among arguments: its path, the tensor, and the value that it held.
Taken: TypeAlias = tuple[Path, torch.Tensor, ValueId]


@dataclass(frozen=True)
class Write:
    """The source of a write to a tensor: numbers of the function call and of the ATen operator."""

    call: int | None
    operator: int | None


class ValueTable:
    """Maps tensors to values while a forward is recorded.

    Tensors are identified by `id`. A fake tensor is kept alive, so that its id is not reused. A real tensor is
    forgotten when it is freed, because all activations of a large batch would not fit into memory.

    Args:
        trace: The trace, which gets the values.
        parameters: `id` -> dotted name of parameters and buffers.
        fake: The mode that creates fake tensors; None for real tensors.
    """

    def __init__(self, trace: ForwardTrace, parameters: dict[int, str], fake: FakeTensorMode | None) -> None:
        self._trace = trace
        self._values = trace.values
        self._parameters = parameters
        self._fake = fake
        self._known: dict[int, ValueId] = {}
        self._tensors: dict[int, Any] = {}  # the tensors, or weak references to them
        # Tensors whose memory was written to through another tensor. They get a new value on their next use, because
        # most of them are never used again.
        self._stale: dict[int, Write] = {}
        self._by_storage: dict[int, list[int]] = {}
        # Real tensors by their id, with the fake ones that stand for them. The mode itself would forget a fake one that
        # nobody uses, and another storage could then get the same identity.
        self._stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._not_indexed: list[int] = []
        self._parameters_not_indexed: list[int] = []

    def close(self) -> None:
        """Releases all tensors."""
        self._known.clear()
        self._tensors.clear()
        self._stand_ins.clear()

    def known(self, tensor: torch.Tensor) -> ValueId | None:
        """Returns the value that a tensor holds now, or None if it has never been seen."""
        identity = id(tensor)
        if self._stale and identity in self._stale:
            self._refresh(tensor)
        return self._known.get(identity)

    def value(self, tensor: torch.Tensor) -> ValueId:
        """Returns the value that a tensor holds now."""
        index = self.known(tensor)
        if index is None:
            index = self._new(tensor)
            self._values[index].parameter = self._parameters.get(id(tensor), "")
        return index

    def made(self, tensor: torch.Tensor, by: Write) -> ValueId:
        """Records that a tensor has a new value."""
        before = self._known.get(id(tensor))
        index = self._new(tensor)
        value = self._values[index]
        value.call, value.operator, value.before = by.call, by.operator, before
        return index

    def written(self, tensor: torch.Tensor, by: Write) -> ValueId:
        """Records a write to a tensor, and thereby to all tensors that share its memory."""
        index = self.made(tensor, by)
        self._stale.pop(id(tensor), None)
        for other in self.sharing(tensor):
            self._stale[id(other)] = by
        return index

    def forget_call(self, index: int) -> None:
        """Records that a function call is dropped from the trace; its writes stay recorded."""
        for identity, by in self._stale.items():
            if by.call == index:
                self._stale[identity] = Write(None, by.operator)

    def same(self, tensor: torch.Tensor, index: ValueId) -> None:
        """Records that a tensor is another object with the same value."""
        self._hold(tensor)
        self._known[id(tensor)] = index

    def all_of(self, structure: Any) -> list[tuple[Path, ValueId]]:
        """Returns the values of the tensors in a structure, with their paths."""
        return [(path, self.value(tensor)) for path, tensor in tensors_with_paths(structure)]

    def inputs_of(self, structure: Any) -> list[tuple[Path, ValueId]]:
        """Returns the values of the tensors in arguments of the model, with their paths."""
        return [(path, self.value(tensor)) for path, tensor in inputs_with_paths(structure)]

    def taken(self, structure: Any, path: Path, found: list[Taken]) -> Any:
        """Returns a structure with its tensors replaced by `Ref`, and appends these to `found`."""
        if isinstance(structure, torch.Tensor):
            index = self.value(structure)
            found.append((path, structure, index))
            return Ref(index)
        if isinstance(structure, (tuple, list)):
            items = [self.taken(item, (*path, position), found) for position, item in enumerate(structure)]
            if isinstance(structure, list):
                return items
            return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
        if is_dataclass(structure) and not isinstance(structure, (type, Mapping)):
            structure = {entry.name: getattr(structure, entry.name, None) for entry in fields(structure)}
        if isinstance(structure, Mapping):
            return {key: self.taken(item, (*path, key), found) for key, item in structure.items()}
        return structure

    def _new(self, tensor: torch.Tensor) -> ValueId:
        index = len(self._values)
        self._values.append(Value(index, tuple(tensor.shape), tensor.dtype))
        self._hold(tensor)
        self._known[id(tensor)] = index
        return index

    def _hold(self, tensor: torch.Tensor) -> None:
        identity = id(tensor)
        if identity in self._tensors:
            return
        if self._fake is None:
            self._tensors[identity] = weakref.ref(tensor, lambda _: self._forget(identity))
        else:
            self._tensors[identity] = tensor
        fake = self._fake is None or isinstance(tensor, FakeTensor)
        (self._not_indexed if fake else self._parameters_not_indexed).append(identity)

    def _forget(self, identity: int) -> None:
        for table in (self._tensors, self._known, self._stale):
            table.pop(identity, None)

    def _refresh(self, tensor: torch.Tensor) -> None:
        by = self._stale.pop(id(tensor))
        before = self._known[id(tensor)]
        index = self.made(tensor, by)
        if by.operator is not None:
            self._trace.operators[by.operator].overwritten.append(index)
        if by.call is not None:
            call = self._trace.calls[by.call]
            call.overwritten.append(index)
            if before not in call.writes:
                call.writes.append(before)

    # Shared memory.

    def _tensor(self, identity: int) -> torch.Tensor | None:
        held = self._tensors.get(identity)
        tensor = held() if isinstance(held, weakref.ref) else held
        return tensor if isinstance(tensor, torch.Tensor) else None

    def sharing(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields other known tensors that have memory in common with `tensor`."""
        self._index(self._not_indexed)
        if self._fake is None or is_view(tensor):
            self._index(self._parameters_not_indexed)  # done late, because each parameter has to be made fake for it
        key = self._storage(tensor)
        for identity in self._by_storage.get(key, ()) if key is not None else ():
            other = self._tensor(identity)
            if other is not None and other is not tensor and self._storage(other) == key and may_overlap(tensor, other):
                yield other

    def _index(self, identities: list[int]) -> None:
        for identity in identities:
            tensor = self._tensor(identity)
            key = None if tensor is None else self._storage(tensor)
            if key is not None:
                self._by_storage.setdefault(key, []).append(identity)
        identities.clear()

    def _storage(self, tensor: torch.Tensor) -> int | None:
        try:
            if self._fake is not None and not isinstance(tensor, FakeTensor):
                # Views of a parameter share memory with the fake tensor that represents it.
                if id(tensor) not in self._stand_ins:
                    self._stand_ins[id(tensor)] = (tensor, self._fake.from_tensor(tensor))
                tensor = self._stand_ins[id(tensor)][1]
            return storage_identity(tensor)
        except (RuntimeError, NotImplementedError):
            return None  # sparse, nested, or wrapped by a function transform


def may_overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Returns whether two tensors in one storage have elements in common; may return True when they do not.

    The result is exact for parts of a tensor made by slicing or `chunk`, which are boxes in a common grid.
    """
    if not first.numel() or not second.numel():
        return False
    if first.dtype != second.dtype or 0 in first.stride() or 0 in second.stride():
        return True
    starts = first.storage_offset(), second.storage_offset()
    ends = tuple(_end(tensor) for tensor in (first, second))
    if ends[0] <= starts[1] or ends[1] <= starts[0]:
        return False
    if first.stride() != second.stride():
        return True
    offsets, room, apart = list(starts), 0, False
    for dim in sorted(range(first.ndim), key=first.stride, reverse=True):
        stride = first.stride(dim)
        low = [offset // stride for offset in offsets]
        high = [low[0] + first.shape[dim], low[1] + second.shape[dim]]
        offsets = [offset % stride for offset in offsets]
        if room and max(high) * stride > room:
            return True  # not a box, because a row extends into the next one
        apart = apart or high[0] <= low[1] or high[1] <= low[0]
        room = stride
    return not apart


def _end(tensor: torch.Tensor) -> int:
    return (
        int(tensor.storage_offset()) + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    )
