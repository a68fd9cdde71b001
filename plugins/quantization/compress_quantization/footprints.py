"""What quantizers mean for the size of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from compress_core import choice
from compress_core.contract.footprint import Footprint
from compress_quantization.config import PRECISION, PrecisionConfig
from compress_quantization.plan import BitsChoice, PlannedQuantizer
from compress_quantization.precision.method import PrecisionMethod

# The exported files have an integer of 8 bits for each element, however few bits its grid has.
_STORED_BITS = 8
# A scale of float32 and a zero point of 8 bits.
_BYTES_OF_A_SCALE = 5


def with_quantizers(
    model: nn.Module,
    footprint: Footprint,
    quantizers: Sequence[PlannedQuantizer],
    precision: PrecisionConfig | None,
    choices: Sequence[BitsChoice],
) -> Footprint:
    """Returns a footprint in which quantizers are on.

    Args:
        model: The model.
        footprint: The footprint without them.
        quantizers: The quantizers.
        precision: How numbers of bits are chosen when the model is created; its values must not count as read.
        choices: The numbers of bits that each quantizer can have.
    """
    method: PrecisionMethod | None = None if precision is None else choice(precision.type, PRECISION)
    is_chosen = method is not None and method.choose is not None
    options = {entry.name: _options(entry, precision) for entry in choices if is_chosen and len(entry.options) > 1}
    found = footprint.remarked({q.name: _words(q, options.get(q.name)) for q in quantizers})
    weights = [q for q in quantizers if q.group == "weights"]
    missing = [q.parameter for q in weights if q.parameter not in footprint]
    if missing:
        found = found.left_open(f"'{missing[0]}' is no parameter of the model before compression", ("size",))
    weights = [q for q in weights if q.parameter in footprint]
    stored = [q for q in weights if not _is_recurrent(model, q.parameter)]
    found = found.with_bits(
        {q.parameter: q.spec.bits for q in stored},
        stored_bits=_STORED_BITS,
        extra_bytes={q.parameter: _BYTES_OF_A_SCALE * _scales(q, footprint) for q in stored},
    )
    if options and precision is not None:
        found = found.noted(f"numbers of bits are chosen from data when the model is created: '{precision.type}'")
    elif is_chosen and precision is not None:
        found = found.noted(
            f"'{precision.type}' has nothing to choose: the device leaves each weight one number of bits"
        )
    if len(stored) < len(weights):
        found = found.noted("weights of recurrent layers are stored as floating-point values, which ONNX demands")
    return found


def _options(entry: BitsChoice, precision: PrecisionConfig | None) -> list[int]:
    """Returns the numbers of bits that a quantizer may get, of those that the user has named if there are any."""
    named = precision.bits if precision is not None and "bits" in precision.model_fields_set else entry.options
    return sorted(set(entry.options).intersection(named)) or sorted(entry.options)


def _words(quantizer: PlannedQuantizer, options: Sequence[int] | None) -> str:
    spec = quantizer.spec
    options = options or [spec.bits]
    bits = f"{options[0]} bits" if len(options) == 1 else f"{', '.join(map(str, options[:-1]))} or {options[-1]} bits"
    return f"{quantizer.group}: {bits}, {spec.mode}, per {'channel' if spec.per_channel else 'tensor'}"


def _scales(quantizer: PlannedQuantizer, footprint: Footprint) -> int:
    """Returns the number of scales: there are fewer for channels if an earlier algorithm removes some."""
    present = footprint.tensor(quantizer.parameter).shape
    if len(present) != len(quantizer.shape):
        return math.prod(quantizer.shape)
    return math.prod(new if size > 1 else 1 for size, new in zip(quantizer.shape, present, strict=True))


def _is_recurrent(model: nn.Module, parameter: str) -> bool:
    layer = parameter.rpartition(".")[0]
    return isinstance(model.get_submodule(layer), nn.RNNBase)
