"""What a method that chooses numbers of bits has to be: the value of a choice of `quantization.precision`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress_core import ChoicePoint
from compress_core.errors import Problem
from compress_quantization.config import PRECISION, PrecisionConfig
from compress_quantization.precision.report import PrecisionReport
from compress_quantization.profiles import Profile

if TYPE_CHECKING:
    from compress_quantization.precision.search import PrecisionSearch


def _no_problems(config: PrecisionConfig, profile: Profile) -> Iterable[Problem]:
    return ()


@dataclass(frozen=True)
class ChosenBits:
    """What a method has chosen.

    Attributes:
        bits: Name of a quantizer -> its number of bits; quantizers that are not named stay as they are.
        effects: Key of the section `initializer.precision` -> what it did, for the ledger.
        report: What was measured; saved with the state.
    """

    bits: Mapping[str, int]
    effects: Mapping[str, str] = field(default_factory=dict)
    report: PrecisionReport | None = None


@dataclass(frozen=True)
class PrecisionMethod:
    """A method that chooses numbers of bits when a model is created.

    Attributes:
        choose: Returns the choice; called once, after the ranges have been calibrated, and not when a state is resumed.
            It may change quantizers through the search alone, which puts them back. None: the config names the bits.
        keys: The keys of the section that it reads; others are refused, because they would have no effect.
        check: Yields what is wrong with the section as far as it can be told without a model. Paths are relative to
            the section `initializer.precision`.
        needs_choice: Whether a device that offers one number of bits for weights is an error; otherwise a warning says
            that nothing was chosen.
    """

    choose: Callable[[PrecisionSearch], ChosenBits] | None
    keys: tuple[str, ...] = ()
    check: Callable[[PrecisionConfig, Profile], Iterable[Problem]] = _no_problems
    needs_choice: bool = True


def _check_method(value: object) -> str | None:
    return None if isinstance(value, PrecisionMethod) else f"must be a PrecisionMethod, got {type(value).__name__}"


POINT = ChoicePoint(
    PRECISION,
    "a compress_quantization.precision.PrecisionMethod, whose function "
    "(compress_quantization.precision.PrecisionSearch) -> compress_quantization.precision.ChosenBits",
    _check_method,
)
