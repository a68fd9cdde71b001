"""`LevelAlgorithm`: base class of algorithms that compress to one level, with masks that can be frozen."""

from __future__ import annotations

from typing import Any

from compress_core.config import AlgorithmConfig
from compress_core.contract.algorithm import Algorithm, all_or_nothing
from compress_core.errors import UsageError


def has_settable_rate(algorithm: Algorithm | type[Algorithm]) -> bool:
    """Returns whether `compression_rate` of an algorithm can be set, so that accuracy-aware training can move it.

    A rate that is set has to hold, measured in the same unit as it is set in, until the masks are allowed to change
    again: the schedule must not move it. `LevelAlgorithm` does so.
    """
    kind = algorithm if isinstance(algorithm, type) else type(algorithm)
    return getattr(kind.compression_rate, "fset", None) is not None


class LevelAlgorithm(Algorithm):
    """Base class of algorithms that compress to a level in [0, 1), such as the share of weights that become zero.

    A subclass implements `set_level` and `level`; it inherits `freeze`, `frozen`, and a settable `compression_rate`,
    which accuracy-aware training moves. If some levels below 1 cannot be reached, it overrides `highest_level`.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._frozen = False

    @property
    def highest_level(self) -> float:
        """The highest level that the model can have; 1 if nothing but the definition limits it."""
        return 1.0

    def level(self) -> float:
        """Returns the level measured on the model."""
        raise NotImplementedError(f"{type(self).__name__} must implement level()")

    def set_level(self, level: float) -> None:
        """Sets a level; called while the masks are not frozen."""
        raise NotImplementedError(f"{type(self).__name__} must implement set_level(level)")

    @property
    def compression_rate(self) -> float:
        """The measured level; setting it sets the level and freezes the masks."""
        return self.level()

    @compression_rate.setter
    def compression_rate(self, rate: float) -> None:
        self._set_rate(rate)

    @all_or_nothing
    def _set_rate(self, rate: float) -> None:
        self._frozen = False
        self.set_level(rate)
        self._frozen = True

    @property
    def frozen(self) -> bool:
        """Whether the masks are frozen, that is, do not change any more."""
        return self._frozen

    def freeze(self, freeze: bool = True) -> None:
        """Freezes the masks, or lets them change again.

        Raises:
            UsageError: `freeze` is neither True nor False.
        """
        if not isinstance(freeze, bool):
            raise UsageError(f"freeze takes True or False, got {freeze!r}")
        self._frozen = freeze

    def _check_level(self, what: str, level: Any) -> None:
        if self._frozen:
            raise UsageError("the masks are frozen; call controller.freeze(False) before setting a level")
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level < 1:
            raise UsageError(f"a {what} must be a number in [0, 1), got {level!r}")
