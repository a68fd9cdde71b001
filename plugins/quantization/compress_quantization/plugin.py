"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Algorithm, Choice, ChoicePoint, hookimpl
from compress_quantization import precision, profile_document, profiles, ranges
from compress_quantization.algorithm import Quantization


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns quantization."""
    return [Quantization]


@hookimpl
def compress_choice_points() -> list[ChoicePoint]:
    """Returns the choice points of range statistics, of devices, and of methods that choose numbers of bits."""
    return [ranges.POINT, profile_document.POINT, precision.POINT]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns NNCF's six range initializers, the methods that choose bits, and the devices that are built in."""
    return [*ranges.CHOICES, *precision.CHOICES, *profiles.built_in_devices()]
