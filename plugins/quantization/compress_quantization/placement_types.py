"""What placement is told (`Rules`), and what it returns (`Placement`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from compress_core.trace import Call
from compress_core.trace.sites import CallRef
from compress_core.transforms.places import ActivationPlace, Path
from compress_quantization.gating import PlacedGate
from compress_quantization.profiles import Operator
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.surroundings import OperatorOf
from compress_quantization.unifying import Unified

# What an operator demands of one of its inputs, or None.
Demand = Callable[[Call, Path], QuantizerSpec | None]

# What an operator demands of its output, or None.
OutputDemand = Callable[[Call], QuantizerSpec | None]


@dataclass(frozen=True)
class Rules:
    """The settings of placement.

    Attributes:
        demand: Returns the quantizer that an operator demands for an input.
        output_demand: Returns the quantizer that an operator demands for its output.
        operator_of: Returns what the device supports for a call.
        quantize_inputs: Whether inputs of the model are quantized.
        output_spec: How outputs of the model are quantized; None to leave them unquantized.
        exact_outputs: Whether outputs of the model stay unquantized even if the operator that makes them demands it.
        unified_kinds: Kinds of operators whose inputs share one quantizer; for "concat", those that meet there.
        unified_calls: Operators that share one quantizer with other operators -> config path of their group.
        stored_masks: Names of buffers that hold masks of attention.
        quantized_gates: Activation functions whose gate the device computes with integers.
    """

    demand: Demand
    output_demand: OutputDemand = lambda call: None
    operator_of: OperatorOf = lambda call: Operator()
    quantize_inputs: bool = True
    output_spec: QuantizerSpec | None = None
    exact_outputs: bool = False
    unified_kinds: frozenset[str] = frozenset({"concat"})
    unified_calls: Mapping[CallRef, str] = field(default_factory=dict)
    stored_masks: frozenset[str] = frozenset()
    quantized_gates: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placed:
    """A placed quantizer of activations.

    Attributes:
        spec: Its settings.
        places: Its places; several if tensors share it, at a concatenation or because config or device require it.
        modules: Dotted names of the modules that produce the quantized tensor, and of those that demand it.
        shape: Shape of the first of its tensors in the example.
        calls: The call of each place, in one of the forwards; None for an input of the model.
        is_constant: Whether its tensors do not depend on inputs of the model; they may have no sample dimension.
    """

    spec: QuantizerSpec
    places: tuple[ActivationPlace, ...]
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    calls: tuple[Call | None, ...]
    is_constant: bool = False


@dataclass(frozen=True)
class Placement:
    """All quantizers of activations of a model.

    Attributes:
        quantizers: The quantizers, in the order of the forward.
        unplaced: Description of each tensor that should be quantized but has no place -> the reason.
        unified: Config path of a group of operators -> its unified quantizer.
        idle_in_training: Places that the forwards in training mode do not reach.
        fixed_in_training: Places that they reach, but only where no gradient flows, so that ranges are not learned.
        gates: The activation functions whose gate is quantized.
        reads: Arguments whose demands were met -> their quantizers, as indices in `quantizers`; several after a
            concatenation.
    """

    quantizers: tuple[Placed, ...]
    unplaced: dict[str, str] = field(default_factory=dict)
    unified: dict[str, Unified] = field(default_factory=dict)
    idle_in_training: frozenset[ActivationPlace] = frozenset()
    fixed_in_training: frozenset[ActivationPlace] = frozenset()
    gates: tuple[PlacedGate, ...] = ()
    reads: Mapping[tuple[CallRef, Path], tuple[int, ...]] = field(default_factory=dict)
