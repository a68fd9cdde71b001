"""Checks, and the tags by which they are chosen: what an algorithm's class and its case declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from unittest import SkipTest

from compress_core.contract.stages import Stage
from compress_core.testing.case import Case, fail

TAGS: Mapping[str, str] = {
    "replaces_modules": "an algorithm declares replaces_modules",
    "changes_in_place": "an algorithm declares changes_in_place",
    "needs_batch": "an algorithm declares needs_batch",
    "needs_uncompressed": "an algorithm declares that it needs the uncompressed model",
    "has_loss": "an algorithm implements compress_loss",
    "has_statistics": "an algorithm implements compress_statistics",
    "sparsity": "all algorithms are of Stage.SPARSITY",
    "needs_data": "the case has a loader",
    # These cannot be derived: `Case(tags=...)` declares them.
    "keeps_activations": "transforms of activations stay in the model that strip() returns",
    "plans_from_weights": "the plan depends on the values of the weights",
    "inductor": "torch's default backend is asked for, which takes up to a minute",
}
_DECLARED = ("keeps_activations", "plans_from_weights", "inductor")


def tags_of(case: Case) -> frozenset[str]:
    """Returns the tags of a case: those that it declares, and those that follow from its algorithms.

    Raises:
        ValueError: It declares one that there is not, or that is derived.
    """
    declared = frozenset(case.tags)
    if wrong := declared - set(_DECLARED):
        raise ValueError(f"Case(tags=...) takes {', '.join(_DECLARED)}, got {', '.join(sorted(wrong))}")
    classes = case.algorithms()
    derived = {
        "replaces_modules": any(cls.replaces_modules for cls in classes),
        "changes_in_place": any(cls.changes_in_place for cls in classes),
        "needs_batch": any(cls.needs_batch for cls in classes),
        "needs_uncompressed": any(cls.needs_uncompressed != "no" for cls in classes),
        "has_loss": any(hasattr(cls, "compress_loss") for cls in classes),
        "has_statistics": any(hasattr(cls, "compress_statistics") for cls in classes),
        "sparsity": all(cls.stage == Stage.SPARSITY for cls in classes),
        "needs_data": case.loader is not None,
    }
    return declared | {tag for tag, holds in derived.items() if holds}


class Check:
    """One promise of the contract, as a function of a case.

    Calling it raises AssertionError (or what the core raises) when an algorithm breaks the promise, and
    `unittest.SkipTest`, which pytest understands, where it is not asked.

    Attributes:
        needs: Tags that a case must have.
        without: Tags that a case must not have -> why.
    """

    def __init__(self, function: Callable[[Case], None], needs: frozenset[str], without: Mapping[str, str]) -> None:
        self._function, self.needs, self.without = function, needs, without
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __repr__(self) -> str:
        return self.__name__

    def reason_to_skip(self, tags: Iterable[str]) -> str:
        """Returns why cases with these tags are not asked, empty when they are."""
        missing = [f"it is for cases where {TAGS[tag]} ('{tag}')" for tag in sorted(self.needs - set(tags))]
        return "; ".join([*missing, *(why for tag, why in self.without.items() if tag in set(tags))])

    def __call__(self, case: Case) -> None:
        """Checks a case."""
        if reason := self.reason_to_skip(tags_of(case)):
            raise SkipTest(reason)
        expected = case.expected_failures.get(self.__name__)
        try:
            self._function(case)
        except SkipTest:
            raise
        except Exception as error:
            if expected is None:
                raise
            raise SkipTest(f"expected to fail: {expected} ({type(error).__name__}: {error})") from error
        if expected is not None:
            fail(
                f"{self.__name__} is declared to fail ({expected}), and it passes",
                "Remove the declaration from Case(expected_failures=...).",
            )


def check(
    *, needs: Iterable[str] = (), without: Mapping[str, str] | None = None
) -> Callable[[Callable[[Case], None]], Check]:
    """Makes a function a check.

    Args:
        needs: Tags that a case must have.
        without: Tags that a case must not have -> why.
    """
    return lambda function: Check(function, frozenset(needs), without or {})
