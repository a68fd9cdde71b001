"""Which algorithm's level moves, and whether the config says so unambiguously."""

from __future__ import annotations

from collections.abc import Sequence

from compress_core.config.accuracy_aware import ADAPTIVE, PATH, AccuracyAwareTraining
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.context import Context
from compress_core.contract.levels import has_settable_rate
from compress_core.errors import ConfigError


def check_accuracy_aware(context: Context, algorithms: Sequence[Algorithm]) -> None:
    """Checks the section `accuracy_aware_training` against the algorithms, and records what reads it.

    Raises:
        ConfigError: The level that should move is not clear.
    """
    section = context.config.root.accuracy_aware_training
    if section is None:
        return
    if section.unread().mode == ADAPTIVE:
        moving_algorithm(section.unread(), algorithms)
    for leaf, value, _ in section.unread().given_leaves(f"{PATH}."):
        context.ledger.record(leaf, value, "used by create_accuracy_aware_training_loop")


def moving_algorithm(section: AccuracyAwareTraining, algorithms: Sequence[Algorithm]) -> Algorithm:
    """Returns the algorithm whose level the search moves.

    Raises:
        ConfigError: None has a level, several have one and none is named, or the one that is named has none.
    """
    path, named = f"{PATH}.params.algorithm", section.params.algorithm
    movable = {algorithm.name: algorithm for algorithm in algorithms if has_settable_rate(algorithm)}
    if not movable:
        present = ", ".join(algorithm.name for algorithm in algorithms) or "there is none"
        raise ConfigError(
            f"is '{ADAPTIVE}', and no algorithm of this config has a level that can move ({present}); add one that "
            "has, or set it to 'early_exit'",
            path=f"{PATH}.mode",
        )
    if named is not None:
        if named not in movable:
            raise ConfigError(f"'{named}' has no level that can move here; {_choose(list(movable))}", path=path)
        return movable[named]
    if len(movable) > 1:
        raise ConfigError(
            f"is missing, and several algorithms have a level: say which one moves while the others follow their "
            f"schedules; {_choose(list(movable))}",
            path=path,
        )
    return next(iter(movable.values()))


def _choose(names: Sequence[str]) -> str:
    return f"choose {' or '.join(repr(name) for name in names)}"
