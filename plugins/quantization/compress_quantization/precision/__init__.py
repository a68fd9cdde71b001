"""Methods that choose numbers of bits: the choice point `quantization.precision`."""

from __future__ import annotations

from compress_core import Choice
from compress_quantization.config import PRECISION
from compress_quantization.precision import autoq, hawq, sensitivity
from compress_quantization.precision.method import POINT, ChosenBits, PrecisionMethod
from compress_quantization.precision.report import FrontierPoint, PrecisionReport
from compress_quantization.precision.search import Group, OutputErrors, PrecisionSearch

__all__ = [
    "CHOICES",
    "POINT",
    "ChosenBits",
    "FrontierPoint",
    "Group",
    "OutputErrors",
    "PrecisionMethod",
    "PrecisionReport",
    "PrecisionSearch",
]

_MANUAL = PrecisionMethod(None, ("bits", "bitwidth_per_scope", "bitwidth_assignment_mode"))

CHOICES = [
    Choice(PRECISION, "manual", _MANUAL, "the numbers that bitwidth_per_scope gives to quantizers by name"),
    Choice(
        PRECISION,
        "sensitivity",
        sensitivity.METHOD,
        "the least error of the output within a budget, measured without labels and solved exactly",
    ),
    Choice(PRECISION, "hawq", hawq.METHOD, "HAWQ-V2: traces of the Hessian times changes of the weights"),
    Choice(
        PRECISION,
        "autoq",
        autoq.METHOD,
        "NNCF's AutoQ, answered by a deterministic search over measured losses of a metric",
    ),
]
