"""Reads and restores containers and objects of the user's, past methods that they override.

A user's dict may refuse writes (the `FrozenDict` of diffusers), an object may keep its attributes in slots or behind a
`__setattr__` of its own. What was read can always be restored, because the methods of the built-in base class are
called, and a container that has not changed is not touched.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections import OrderedDict, deque
from types import MemberDescriptorType
from typing import Any

# In this order, because an OrderedDict keeps the order of its keys itself.
_BASES: tuple[type[Any], ...] = (OrderedDict, dict, list, set, deque, bytearray)
_MISSING = object()


def container_base(value: object) -> type[Any] | None:
    """Returns the built-in class of a mutable container, by which it is read and restored; None for other objects."""
    cls: Any = type(value)
    return _base_of(cls)


@functools.lru_cache(maxsize=1 << 12)
def _base_of(cls: Any) -> type[Any] | None:
    return next((base for base in _BASES if issubclass(cls, base)), None)


class SavedContainer:
    """The contents of a mutable container; the container stays the same object.

    Args:
        container: A dict, list, set, deque or bytearray, or an object of a class derived from one of these.
        ignored: Keys of a dict that are neither compared nor restored.
    """

    def __init__(self, container: Any, ignored: frozenset[str] = frozenset()) -> None:
        base = container_base(container)
        if base is None:
            raise TypeError(f"a {type(container).__name__} is no container that can be restored")
        self.container, self._base, self._ignored = container, base, ignored
        self._contents = self._read()

    @property
    def values(self) -> list[Any]:
        """What was in the container: the values of a dict, the items of others."""
        if self._base in (dict, OrderedDict):
            return list(self._contents[1])
        return [] if self._base is bytearray else self._contents

    def is_same(self) -> bool:
        """Returns whether the container holds the same objects, in the same order unless it is a set."""
        now = self._read()
        if self._base is bytearray:
            return bool(now == self._contents)
        if self._base is set:
            return {id(item) for item in now} == {id(item) for item in self._contents}
        if self._base in (dict, OrderedDict):
            return _are_same(now[0], self._contents[0]) and _are_same(now[1], self._contents[1])
        return _are_same(now, self._contents)

    def restore(self) -> None:
        """Puts the same objects back, in the same order unless the container is a set."""
        if self.is_same():
            return
        container, base = self.container, self._base
        if base in (dict, OrderedDict):
            kept = [(key, value) for key, value in base.items(container) if self._ignores(key)]
            base.clear(container)
            for key, value in [*zip(*self._contents, strict=True), *kept]:
                if not _is_dead(key) and not _is_dead(value):
                    base.__setitem__(container, key, value)
        elif base is bytearray:
            bytearray.__setitem__(container, slice(None), self._contents)
        elif base is list:
            list.__setitem__(container, slice(None), self._contents)
        elif base is set:
            set.clear(container)
            set.update(container, self._contents)
        else:
            deque.clear(container)
            deque.extend(container, self._contents)

    def _read(self) -> Any:
        """Returns the items; of a dict, its keys and its values: pairs would be many more objects."""
        if self._base in (dict, OrderedDict):
            if not self._ignored:
                return list(self._base.keys(self.container)), list(self._base.values(self.container))
            items = [item for item in self._base.items(self.container) if not self._ignores(item[0])]
            return [key for key, _ in items], [value for _, value in items]
        return bytes(self.container) if self._base is bytearray else list(self._base.__iter__(self.container))

    def _ignores(self, key: Any) -> bool:
        return isinstance(key, str) and key in self._ignored


def _are_same(items: list[Any], others: list[Any]) -> bool:
    return len(items) == len(others) and all(map(operator.is_, items, others))


class SavedSlots:
    """The attributes that an object keeps in `__slots__`.

    Args:
        owner: The object.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._saved = [(slot, _read_slot(slot, owner)) for slot in _slots_of(type(owner))]  # type: ignore[arg-type]

    @property
    def values(self) -> list[Any]:
        """The values of the attributes that were set."""
        return [value for _, value in self._saved if value is not _MISSING]

    def is_same(self) -> bool:
        """Returns whether all attributes are the same objects."""
        return all(_read_slot(slot, self._owner) is value for slot, value in self._saved)

    def restore(self) -> None:
        """Sets the attributes again, past a `__setattr__` of the class."""
        for slot, value in self._saved:
            if _read_slot(slot, self._owner) is value:
                continue
            if value is _MISSING:
                slot.__delete__(self._owner)
            else:
                slot.__set__(self._owner, value)


@functools.lru_cache(maxsize=1 << 12)
def _slots_of(cls: Any) -> list[MemberDescriptorType]:
    found = [vars(base).items() for base in cls.__mro__ if "__slots__" in vars(base)]
    # A slot named __weakref__ or __dict__ is no attribute, and is another kind of descriptor.
    return [slot for items in found for _, slot in items if isinstance(slot, MemberDescriptorType)]


def _read_slot(slot: MemberDescriptorType, owner: object) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return _MISSING


def _is_dead(value: Any) -> bool:
    return isinstance(value, weakref.ref) and value() is None
