"""Waits until all processes have begun the same call, and says who is missing.

A collective operation cannot do this: one that is left, by Ctrl-C or because a process never comes, leaves the group
unusable, does not say who is missing, and may take part in an operation of the user's that a process has gone on to.
So the processes meet in the store through which they have found each other. Each call of a process has a number, and
each number one outcome, which is written once: all have come, or one has failed or waited for too long. A process that
was not there finds the outcome when it makes its next call.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from typing import Any

from compress_core.errors import RankError

logger = logging.getLogger(__name__)

# Seconds after which a process says for whom it waits; each further time comes after twice as long.
PATIENCE = 10.0

_COME = "all have come"
# Seconds between two looks into the store: at first others come within a millisecond, later it should stay idle.
_SHORTEST, _LONGEST = 0.0005, 0.05


class RollCall:
    """The meetings of all processes of one group.

    Attributes:
        begun: Whether all have come to the last meeting, even if this process was interrupted there.

    Args:
        store: A store of `torch.distributed` that all of them share.
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self._rank, self._size = store, rank, size
        self._number = 0
        self.begun = False

    @property
    def time_limit(self) -> timedelta:
        """How long a process waits for the others: as long as those of the group do for anything."""
        limit: timedelta = self.store.timeout
        return limit

    def meet(self, call: str) -> list[str]:
        """Returns what each process calls, by rank, once all have come.

        Args:
            call: What this process calls.

        Raises:
            RankError: Another process has failed before it came, or waited for too long.
        """
        number = self._next()
        self.begun = False
        try:
            self.store.set(self._key(number, self._rank), call)
            outcome = self._wait(number, call)
        except BaseException as error:
            # If all have come meanwhile the others have begun, and have to be told of this error later.
            self.begun = self._decide(number, _reason(error)) == _COME
            raise
        if outcome != _COME:
            failed = json.loads(outcome)
            raise RankError(f"rank {failed['rank']} of {self._size} {failed['what']}")
        self.begun = True
        return [self._read(self._key(number, rank)) for rank in range(self._size)]

    def fail(self, call: str, error: BaseException) -> None:
        """Notes, without waiting, that this process has failed before it met the others."""
        self._decide(self._next(), _reason(error, call))

    def _next(self) -> int:
        self._number += 1
        # Whoever has come to the last meeting needs nothing of the one before.
        for name in (self._rank, "outcome"):
            self.store.delete_key(self._key(self._number - 2, name))
        return self._number

    def _wait(self, number: int, call: str) -> str:
        start, pause, patience = time.monotonic(), _SHORTEST, PATIENCE
        missing = [rank for rank in range(self._size) if rank != self._rank]
        while True:
            missing = [rank for rank in missing if not self.store.check([self._key(number, rank)])]
            if not missing:
                return self._decide(number, _COME)
            if self.store.check([self._key(number, "outcome")]):
                return self._read(self._key(number, "outcome"))
            waited = time.monotonic() - start
            if waited > self.time_limit.total_seconds():
                raise RankError(_absent(self._rank, missing, call, waited))
            if waited > patience:
                logger.warning("%s", _absent(self._rank, missing, call, waited))
                patience *= 2
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def _decide(self, number: int, outcome: str) -> str:
        """Returns the outcome of a meeting: this one, if none has been written yet."""
        if outcome != _COME:
            outcome = json.dumps({"rank": self._rank, "what": outcome})
        found: bytes = self.store.compare_set(self._key(number, "outcome"), "", outcome)
        return found.decode()

    def _key(self, number: int, name: object) -> str:
        return f"compress_core/{number}/{name}"

    def _read(self, key: str) -> str:
        found: bytes = self.store.get(key)
        return found.decode()


def _reason(error: BaseException, call: str | None = None) -> str:
    if isinstance(error, RankError):
        return f"gave up: {error}"
    where = "" if call is None else f" in {call}"
    return f"failed{where}, so all have stopped: {type(error).__name__}: {error}"


def _absent(rank: int, missing: list[int], call: str, waited: float) -> str:
    who = f"rank {missing[0]}, which has" if len(missing) == 1 else f"ranks {missing}, which have"
    return (
        f"rank {rank} has waited {waited:.0f} s in {call} for {who} not called it. All ranks must call "
        "create_compressed_model and the controller's methods that change the model, in the same order; or wrap what "
        "belongs to one process alone in compress_core.data.ranks.alone()"
    )
