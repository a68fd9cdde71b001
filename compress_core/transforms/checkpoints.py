"""What a `state_dict` holds of transforms: each of them once, and on loading all of them or none."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_CHAINS, _AWAITS = "_compress_chains", "_compress_awaits_checkpoint"


# Saving.

_saving: ContextVar[tuple[weakref.ref[Any], set[int]] | None] = ContextVar("_saving", default=None)


def count_chains(transform: nn.Module, change: int) -> None:
    """Notes that a transform was added to one more chain (1) or removed from one (-1)."""
    transform.__dict__[_CHAINS] = transform.__dict__.get(_CHAINS, 0) + change


def may_be_shared(transform: nn.Module) -> bool:
    """Returns whether a transform has been added to several chains."""
    return bool(transform.__dict__.get(_CHAINS, 0) > 1)


def saved_before(destination: Any, transform: nn.Module) -> bool:
    """Returns whether a transform has been saved to this `state_dict` already; notes that it is now."""
    current = _saving.get()
    if current is None or current[0]() is not destination:
        try:
            current = weakref.ref(destination), set()
        except TypeError:  # a plain dict of the user's: every place is saved
            return False
        _saving.set(current)
    saved = current[1]
    if id(transform) in saved:
        return True
    saved.add(id(transform))
    return False


# Loading.


@dataclass
class Loading:
    """One call of `load_state_dict`: which transforms have been found so far, and which have not.

    Attributes:
        found: Ids of the transforms of which the checkpoint has values.
        absent: The names that the checkpoint lacks, by the id of the transform.
        reported: Ids of the absent transforms whose names are in the list of missing keys.
    """

    found: set[int] = field(default_factory=set)
    absent: dict[int, list[str]] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)

    def note_found(self, transform: nn.Module, missing_keys: list[str]) -> None:
        """Notes that the checkpoint has values of a transform, at this place or another one."""
        self.found.add(id(transform))
        transform.__dict__.pop(_AWAITS, None)
        names = self.absent.pop(id(transform), [])
        if id(transform) in self.reported:
            missing_keys[:] = [name for name in missing_keys if name not in names]

    def note_absent(self, transform: nn.Module, names: list[str]) -> None:
        """Notes that the checkpoint has no value of a transform at this place."""
        if id(transform) not in self.found:
            self.absent.setdefault(id(transform), names)

    def report(self, missing_keys: list[str]) -> None:
        """Adds the names of absent transforms to the missing keys, if the checkpoint has other transforms."""
        for identity, names in self.absent.items() if self.found else ():
            if identity not in self.reported:
                self.reported.add(identity)
                missing_keys.extend(names)


_loading: ContextVar[tuple[list[str], Loading] | None] = ContextVar("_loading", default=None)


def loading_of(missing_keys: list[str]) -> Loading:
    """Returns the record of the running `load_state_dict`, which has one list of missing keys for all modules."""
    current = _loading.get()
    if current is None or current[0] is not missing_keys:
        current = missing_keys, Loading()
        _loading.set(current)
    return current[1]


# Resuming.


@dataclass
class Awaited:
    """The transforms of a resumed model whose values a checkpoint has to bring."""

    transforms: list[tuple[str, nn.Module]]
    said: bool = False

    def say(self) -> None:
        """Logs a warning, once, if some of them are still waiting."""
        waiting = [name for name, transform in self.transforms if awaits_checkpoint(transform)]
        if waiting and not self.said:
            self.said = True
            logger.warning(
                "this model was built from a compression state, and no checkpoint has filled %d of its %d transforms, "
                "such as %s: their values (ranges, masks) are not those of the training, so its outputs are wrong. "
                "Call model.load_state_dict() with the state_dict of the compressed model, not that of the plain one",
                len(waiting),
                len(self.transforms),
                waiting[:3],
            )


def awaits_checkpoint(transform: nn.Module) -> bool:
    """Returns whether a transform of a resumed model still has the values with which it was made."""
    return _AWAITS in transform.__dict__


def mark_awaiting(transforms: Iterable[nn.Module]) -> None:
    """Notes that a checkpoint has to bring the values of transforms."""
    for transform in transforms:
        transform.__dict__[_AWAITS] = True


def mark_filled(transforms: Iterable[nn.Module]) -> None:
    """Notes that transforms have meaningful values: measured, computed, or restored from a compression state."""
    for transform in transforms:
        transform.__dict__.pop(_AWAITS, None)
