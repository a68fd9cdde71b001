"""The plan of quantization: all quantizers of a model, as JSON-able values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from compress_core.transforms.places import ActivationPlace, place_from_dict
from compress_quantization.config import QuantizerGroup, RangeConfig
from compress_quantization.quantizer_config import QuantizerSpec

GATE_SPEC = QuantizerSpec(bits=8, mode="symmetric", signed=False)
"""The settings of the quantizer of a gate."""


@dataclass(frozen=True)
class InitialRange:
    """How the range of a quantizer is initialized; see `RangeConfig`.

    Attributes:
        type: The statistic.
        num_init_samples: Number of samples to measure; 0 for no initialization.
        percentiles: Lower and upper percentile, for the percentile types.
    """

    type: str = "mixed_min_max"
    num_init_samples: int = 256
    percentiles: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: RangeConfig) -> InitialRange:
        """Returns the settings of a section; reads the percentiles only for types that use them."""
        percentiles = None
        if config.type in ("percentile", "mean_percentile"):
            percentiles = (config.params.min_percentile, config.params.max_percentile)
        return cls(config.type, config.num_init_samples, percentiles)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitialRange:
        """Restores an object from what `dataclasses.asdict` returned."""
        percentiles = values["percentiles"]
        found = None if percentiles is None else (percentiles[0], percentiles[1])
        return cls(values["type"], values["num_init_samples"], found)

    def to_config(self) -> RangeConfig:
        """Returns a section with the same settings."""
        low, high = self.percentiles or (0.1, 99.9)
        params = {"min_percentile": low, "max_percentile": high}
        values = {"type": self.type, "num_init_samples": self.num_init_samples, "params": params}
        return RangeConfig.model_validate(values)


@dataclass(frozen=True)
class PlannedQuantizer:
    """One quantizer of a plan.

    Attributes:
        name: Its name in statistics and `bitwidth_per_scope`: `<scope>|WEIGHT`, `|OUTPUT` or `|INPUT<n>`.
        group: `weights` or `activations`.
        spec: Its settings.
        shape: Shape of its scale, which broadcasts against the tensor.
        parameter: Dotted name of the weight; empty for activations.
        places: Its places; empty for weights.
        initial_range: How its range is initialized: type, number of samples and percentiles.
        is_gate: Whether it is the quantizer of a gate (`gates`), whose range is fixed, and not that of a tensor.
    """

    name: str
    group: QuantizerGroup
    spec: QuantizerSpec
    shape: tuple[int, ...]
    parameter: str = ""
    places: tuple[ActivationPlace, ...] = ()
    initial_range: InitialRange = InitialRange()
    is_gate: bool = False

    @classmethod
    def of_gate(cls, name: str, place: ActivationPlace) -> PlannedQuantizer:
        """Returns the entry of a gate, which is not calibrated."""
        unmeasured = InitialRange(num_init_samples=0)
        return cls(name, "activations", GATE_SPEC, (1,), places=(place,), initial_range=unmeasured, is_gate=True)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {
            "name": self.name,
            "group": self.group,
            "spec": self.spec.to_dict(),
            "shape": list(self.shape),
            "parameter": self.parameter,
            "places": [place.to_dict() for place in self.places],
            "initial_range": asdict(self.initial_range),
            **({"is_gate": True} if self.is_gate else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlannedQuantizer:
        """Restores an object from what `to_dict` returned."""
        return cls(
            name=values["name"],
            group=values["group"],
            spec=QuantizerSpec.from_dict(values["spec"]),
            shape=tuple(values["shape"]),
            parameter=values["parameter"],
            places=tuple(place_from_dict(place) for place in values["places"]),
            initial_range=InitialRange.from_dict(values["initial_range"]),
            is_gate=values.get("is_gate", False),
        )


@dataclass(frozen=True)
class BitsChoice:
    """The numbers of bits that a quantizer can have.

    Attributes:
        name: Its name.
        group: `weights` or `activations`.
        options: Number of bits -> its settings; one if the config gives it or the device offers no other.
        parameter: Dotted name of the weight; empty for activations.
        order: When the forward first uses it; for weights.
        multiplications: How many multiplications of the example forward the elements of the weight take part in.
        inputs: Names of the quantizers of the activations that the weight is multiplied with.
    """

    name: str
    group: QuantizerGroup
    options: Mapping[int, QuantizerSpec]
    parameter: str = ""
    order: int = 0
    multiplications: int = 0
    inputs: tuple[str, ...] = ()


@dataclass
class QuantizationPlan:
    """All quantizers of a model.

    Attributes:
        quantizers: Weights first, then activations, each in the order of the forward.
        skipped: A tensor that could be quantized but is not -> the reason.
        potential: Group -> number of quantizers without scopes.
        choices: The numbers of bits that each quantizer can have, for methods that choose them.
    """

    quantizers: list[PlannedQuantizer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    potential: dict[str, int] = field(default_factory=dict)
    choices: list[BitsChoice] = field(default_factory=list)
