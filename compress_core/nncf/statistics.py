"""Statistics with the names that NNCF's scripts read, beside those that they have here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from compress_core.contract.statistics import CompressionStatistics, Statistics
from compress_core.errors import UsageError

# Names of NNCF whose figures are not here -> what is.
_INSTEAD = {
    "thresholds": "'layers', which has the level of each weight: masks take exactly as many weights as the level says, "
    "with no threshold",
    "prune_flops": "'counts_flops'",
    "pruned_layers_summary": "'layers'",
}


@dataclass(frozen=True)
class QuantizersCounter:
    """How many quantizers there are of each kind; `potential_count` is how many there would be without scopes."""

    num_symmetric: int
    num_asymmetric: int
    num_signed: int
    num_unsigned: int
    num_per_tensor: int
    num_per_channel: int
    total_count: int
    potential_count: int


@dataclass(frozen=True)
class LayerSummary:
    """The sparsity of one weight; `weight_percentage` is its share of all sparsified ones in percent."""

    name: str
    weight_shape: list[int]
    sparsity_level: float
    weight_percentage: float


@dataclass(frozen=True)
class ModelSparsity:
    """Levels of sparsity: of all parameters of the model, of the sparsified weights, and of each of these."""

    sparsity_level: float
    sparsity_level_for_layers: float
    sparsified_layers_summary: list[LayerSummary]


@dataclass(frozen=True)
class ModelPruning:
    """What pruning leaves of the model."""

    full_flops: int
    current_flops: int
    full_params_num: int
    current_params_num: int
    pruning_level: float


class AlgorithmStatistics:
    """The statistics of one algorithm, with NNCF's names; everything else is that of `part`.

    Args:
        part: The statistics.
    """

    def __init__(self, part: Statistics) -> None:
        self.part = part

    def __getattr__(self, name: str) -> Any:
        if name == "part":  # a copy is asked for it before it is there
            raise AttributeError(name)
        if hasattr(self.part, name):
            return getattr(self.part, name)
        # Algorithms are told apart by what they count, since the core knows none by name.
        kinds = (("quantizers", _OF_QUANTIZERS), ("full_flops", _OF_CHANNELS), ("sparsity_level", _OF_WEIGHTS))
        for figure, names in kinds:
            if hasattr(self.part, figure):
                if name in names:
                    return names[name](self.part)
                if name in _INSTEAD:
                    raise UsageError(f"the statistics have no '{name}' here; use {_INSTEAD[name]}")
        raise AttributeError(f"{type(self.part).__name__} has no '{name}'; to_dict() lists the figures")


class NNCFStatistics(CompressionStatistics):
    """The statistics of all algorithms; attributes are `AlgorithmStatistics`."""

    def __getattr__(self, name: str) -> Any:
        return AlgorithmStatistics(super().__getattr__(name))


def _counter(part: Any, group: str) -> QuantizersCounter:
    found = [quantizer for quantizer in part.quantizers if quantizer.group == group]
    symmetric = sum(quantizer.mode == "symmetric" for quantizer in found)
    signed = sum(quantizer.signed for quantizer in found)
    per_channel = sum(quantizer.per_channel for quantizer in found)
    total = len(found)
    return QuantizersCounter(
        symmetric,
        total - symmetric,
        signed,
        total - signed,
        total - per_channel,
        per_channel,
        total,
        part.potential[group],
    )


def _per_bits(part: Any, group: str) -> dict[int, int]:
    return dict(Counter(quantizer.bits for quantizer in part.quantizers if quantizer.group == group))


def _enabled(part: Any) -> float:
    enabled = sum(bool(quantizer.enabled) for quantizer in part.quantizers)
    return 100.0 * enabled / (len(part.quantizers) or 1)


def _sparse_model(part: Any) -> ModelSparsity:
    total = sum(layer.weights for layer in part.layers) or 1
    layers = [
        LayerSummary(layer.name, list(layer.shape), layer.level, 100.0 * layer.weights / total) for layer in part.layers
    ]
    return ModelSparsity(part.model_sparsity_level, part.sparsity_level, layers)


def _pruned_model(part: Any) -> ModelPruning:
    return ModelPruning(
        part.full_flops, part.current_flops, part.full_parameters, part.current_parameters, part.pruning_level
    )


_OF_QUANTIZERS = {
    "wq_counter": lambda part: _counter(part, "weights"),
    "aq_counter": lambda part: _counter(part, "activations"),
    "num_wq_per_bitwidth": lambda part: _per_bits(part, "weights"),
    "num_aq_per_bitwidth": lambda part: _per_bits(part, "activations"),
    "ratio_of_enabled_quantizations": _enabled,
}
_OF_CHANNELS = {
    "model_statistics": _pruned_model,
    "current_pruning_level": lambda part: part.pruning_level,
    "target_pruning_level": lambda part: part.requested_level,
}
_OF_WEIGHTS = {
    "model_statistics": _sparse_model,
    "target_sparsity_level": lambda part: part.requested_level,
}
