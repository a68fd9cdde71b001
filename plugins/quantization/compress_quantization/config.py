"""The section `quantization`: NNCF's keys and defaults.

`compress_quantization.config_checks` checks that the values fit together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from compress_core import AlgorithmConfig, ChoiceOf, Section
from compress_core.config import Count, InitializerSection, Scopes

Bits = Annotated[Count, Field(ge=2, le=8)]
Percentile = Annotated[float, Field(ge=0, le=100)]
Epoch = Annotated[Count, Field(ge=0)]

Mode = Literal["symmetric", "asymmetric"]
QuantizerGroup = Literal["weights", "activations"]

# Choice points that plugins can add to; `ranges` and `precision` describe their values.
RANGE = "quantization.range"
PRECISION = "quantization.precision"


class RangeParams(Section):
    """Section `initializer.range.params`."""

    min_percentile: Percentile = Field(
        0.1,
        description="percentile types: percentile that becomes the minimum; by default 0.1, or 0 below a low max",
    )
    max_percentile: Percentile = Field(
        99.9,
        description="percentile types: percentile that becomes the maximum; by default 99.9, or 100 above a high min",
    )

    @model_validator(mode="after")
    def _follow_what_was_given(self) -> Self:
        """Adjusts a default that contradicts what the user wrote."""
        # Through __dict__, so that nothing counts as read or as given.
        values, given = self.__dict__, self.model_fields_set
        if values["min_percentile"] >= values["max_percentile"]:
            values.update({n: v for n, v in (("min_percentile", 0.0), ("max_percentile", 100.0)) if n not in given})
        return self


class RangeConfig(Section):
    """Section `initializer.range` as one object, for all quantizers."""

    type: Annotated[str, ChoiceOf(RANGE)] = Field(
        "mixed_min_max", description="statistic that the range of a quantizer starts from"
    )
    num_init_samples: Count = Field(256, ge=0, description="samples to collect statistics on; 0 for no initialization")
    params: RangeParams = Field(default_factory=RangeParams, description="parameters of the percentile types")


class ScopedRangeConfig(RangeConfig):
    """Entry of `initializer.range` as a list; each quantizer must match exactly one entry."""

    target_scopes: Scopes = Field(default_factory=list, description="quantizers that this entry is for")
    ignored_scopes: Scopes = Field(default_factory=list, description="quantizers that this entry is not for")
    validate_scopes: bool = Field(True, description="whether a scope that matches nothing is an error")
    target_quantizer_group: QuantizerGroup | None = Field(
        None, description="whether the entry is for weights or for activations; by default for both"
    )


def _object_or_list(value: Any) -> str:
    # The tags are names of containers, because paths in messages leave out such parts of a location.
    return "list" if isinstance(value, list) else "dict"


RangeSection = Annotated[
    Annotated[RangeConfig, Tag("dict")] | Annotated[list[ScopedRangeConfig], Tag("list")],
    Discriminator(_object_or_list),
]


def _bits_and_scope(value: Any) -> Any:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or not isinstance(value[1], str) or isinstance(value[0], (str, bool)):
        raise ValueError('must be a pair [bits, scope] such as [4, "layer1.0.conv1|WEIGHT"]')
    return tuple(value)


BitsAndScope = Annotated[tuple[Bits, str], BeforeValidator(_bits_and_scope)]


class BudgetConfig(Section):
    """Section `initializer.precision.budget`: what the chosen numbers of bits may cost; exactly one of its keys."""

    average_bits: float | None = Field(
        None, gt=0, le=8, description="mean number of bits of all elements of weights that have a quantizer"
    )
    bit_operations: float | None = Field(
        None,
        gt=0,
        le=1,
        description="multiplications times bits of the weight times bits of the activation, as a share of the same "
        "with 8 bits everywhere",
    )
    file_size: float | None = Field(
        None,
        gt=0,
        description="megabytes (10^6 bytes) of all tensors that the stripped model saves, scales included, with the "
        "weights of quantizers packed at their number of bits",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in type(self).model_fields if self.__dict__[name] is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of average_bits, bit_operations and file_size, not {len(given)}")
        return self

    @property
    def given(self) -> tuple[str, float]:
        """The name of the one that is given, and its value."""
        name = next(name for name in type(self).model_fields if self.__dict__[name] is not None)
        return name, getattr(self, name)


class PrecisionConfig(Section):
    """Section `initializer.precision`: how quantizers get different numbers of bits."""

    type: Annotated[str, ChoiceOf(PRECISION)] = Field(
        "manual", description="manual: as bitwidth_per_scope says; the other methods choose numbers of bits"
    )
    bits: list[Bits] = Field(
        [2, 4, 8],
        description="numbers of bits to choose from, as far as the device offers them; sensitivity: by default all",
        min_length=1,
    )
    bitwidth_per_scope: list[BitsAndScope] = Field(
        default_factory=list,
        description="manual: pairs of bits and a quantizer, named by a scope followed by |WEIGHT, |OUTPUT or |INPUT<n>",
    )
    bitwidth_assignment_mode: Literal["strict", "liberal"] = Field(
        "liberal", description="strict: all quantizers that feed one operator must have the same number of bits"
    )
    num_data_points: Count = Field(
        100, gt=0, description="hawq: samples for the Hessian; sensitivity, autoq: samples for the error of the output"
    )
    iter_number: Count | None = Field(
        None, ge=0, description="hawq: most iterations for a trace, 200; autoq: evaluations of swaps, 0"
    )
    tolerance: float = Field(
        1e-4, gt=0, description="hawq: relative standard error of the sum of traces at which iterations end"
    )
    compression_ratio: float | None = Field(
        None,
        gt=0,
        description="hawq: bit complexity with 8 bits everywhere, divided by that of the choice, 1.5; autoq: size of "
        "the weights as a share of that with 32 bits, 0.15",
    )
    budget: BudgetConfig | None = Field(
        None, description="sensitivity: what the choice may cost; hawq: the same in place of compression_ratio"
    )
    output_error: Literal["auto", "kl", "squared"] = Field(
        "auto",
        description="how the output's error is measured: kl: divergence of the softmax over dimension 1; squared: mean "
        "square relative to the output's, averaged over outputs; auto: squared; for hawq, kl if the output is one "
        "tensor of two dimensions",
    )
    frontier_points: Count = Field(
        9, ge=0, le=100, description="sensitivity: budgets for which the error is predicted and measured"
    )
    sensitivities_path: str | None = Field(
        None,
        description="sensitivity: file of errors measured before: the precision.json that dump_init_precision_data "
        "wrote; another budget then needs no measurement",
    )
    eval_subset_ratio: float = Field(1.0, gt=0, le=1, description="autoq: share of the data for an evaluation")
    warmup_iter_number: Count | None = Field(
        None, ge=0, description="autoq: of NNCF's random policy, which the search here does not have: no effect"
    )
    traces_per_layer_path: str | None = Field(
        None,
        description="hawq: file of traces computed before: .npy, .json (as dump_init_precision_data wrote it), or a "
        "tensor that torch.save wrote",
    )
    dump_init_precision_data: bool = Field(False, description="hawq, autoq, sensitivity: write what was measured")
    dump_path: str | None = Field(None, description="the folder that dump_init_precision_data writes to")
    params: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="settings of a method that another package contributes"
    )


class QuantizationInitializer(InitializerSection):
    """Section `initializer`."""

    range: RangeSection | None = Field(
        None,
        description="statistics for the initial ranges: an object for all quantizers, or a list of objects with "
        "scopes; by default mixed_min_max over 256 samples",
    )
    precision: PrecisionConfig | None = Field(None, description="different numbers of bits for different quantizers")


class _QuantizerOptions(Section):
    mode: Mode | None = Field(
        None, description="symmetric: the scale is learned; asymmetric: both ends of the range; default from the preset"
    )
    bits: Bits | None = Field(None, description="number of bits; by default the first that the device offers: 8")
    signed: bool | None = Field(
        None, description="symmetric: whether the grid has values below zero; by default decided from statistics"
    )
    per_channel: bool | None = Field(
        None, description="one range for each channel instead of one for the tensor; by default as the device prefers"
    )


class _GroupConfig(_QuantizerOptions):
    logarithm_scale: bool = Field(False, description="learn the logarithm of the scale")
    ignored_scopes: Scopes = Field(default_factory=list, description="parts of the model to leave unquantized")
    target_scopes: Scopes = Field(default_factory=list, description="if given, the only parts to quantize")
    validate_scopes: bool = Field(True, description="whether a scope that matches nothing is an error")


class WeightsConfig(_GroupConfig):
    """Section `weights`."""


class ActivationsConfig(_GroupConfig):
    """Section `activations`."""

    unified_scale_ops: list[list[str]] = Field(
        default_factory=list, description="groups of operators whose inputs share one quantizer"
    )


class OverrideInitializer(Section):
    """Section `scope_overrides.<group>.<scope>.initializer`."""

    range: RangeConfig | None = Field(None, description="statistics for the initial ranges of these quantizers")


class ScopeOverride(_QuantizerOptions):
    """Section `scope_overrides.<group>.<scope>`."""

    initializer: OverrideInitializer = Field(
        default_factory=OverrideInitializer, description="what is measured on data for these quantizers"
    )


class ScopeOverrides(Section):
    """Section `scope_overrides`; if several scopes match a quantizer, later entries override earlier ones by value."""

    weights: dict[str, ScopeOverride] = Field(default_factory=dict, description="scope -> settings of weights")
    activations: dict[str, ScopeOverride] = Field(default_factory=dict, description="scope -> settings of activations")


class StagedParams(Section):
    """Section `params`: if it has any value, weights and activations are quantized only from certain epochs on.

    All other keys belong to NNCF's example scripts; neither NNCF itself nor this package reads them.
    """

    activations_quant_start_epoch: Epoch = Field(1, description="epoch, from 0, at which activations are quantized")
    weights_quant_start_epoch: Epoch = Field(1, description="epoch, from 0, at which weights are quantized")
    batch_multiplier: float | None = Field(None, description="has no effect")
    lr_poly_drop_start_epoch: float | None = Field(None, description="has no effect")
    lr_poly_drop_duration_epochs: float | None = Field(None, description="has no effect")
    disable_wd_start_epoch: float | None = Field(None, description="has no effect")
    base_lr: float | None = Field(None, description="has no effect")
    base_wd: float | None = Field(None, description="has no effect")

    @property
    def staged(self) -> bool:
        """Whether quantization begins in stages, which is so if the section has any value."""
        return bool(self.model_fields_set)


class QuantizationConfig(AlgorithmConfig):
    """Section of the algorithm `quantization`."""

    algorithm: Literal["quantization"] = Field(description="name of the algorithm")
    initializer: QuantizationInitializer = Field(
        default_factory=QuantizationInitializer, description="what is measured on data before training"
    )
    preset: Literal["performance", "mixed"] | None = Field(
        None,
        description="performance: symmetric weights and activations, the default; mixed: symmetric weights, asymmetric "
        "activations",
    )
    quantize_inputs: bool = Field(True, description="whether inputs of the model are quantized")
    quantize_outputs: bool = Field(
        False,
        description="whether outputs of the model are quantized; by default, those of which the device needs it to "
        "compute a layer with integers",
    )
    weights: WeightsConfig = Field(default_factory=WeightsConfig, description="settings of all weights")
    activations: ActivationsConfig = Field(default_factory=ActivationsConfig, description="settings of all activations")
    scope_overrides: ScopeOverrides = Field(
        default_factory=ScopeOverrides, description="settings of single quantizers, over those of their group"
    )
    overflow_fix: Literal["enable", "disable", "first_layer_only"] = Field(
        "enable",
        description="half-range grids for 8-bit weights, against overflow in 16-bit accumulators of older CPUs: in all "
        "layers, in none, or in the first convolution; for target_device ANY, CPU, onnxruntime-cpu and openvino-cpu",
    )
    export_to_onnx_standard_ops: bool | None = Field(
        None, description="only true, without effect: export always writes QuantizeLinear and DequantizeLinear"
    )
    compression_lr_multiplier: float | None = Field(
        None, gt=0, description="factor on the gradients of scales and ranges; by default the top-level value"
    )
    params: StagedParams = Field(default_factory=StagedParams, description="epochs from which quantization is on")

    @model_validator(mode="before")
    @classmethod
    def _hint_at_groups(cls, values: Any) -> Any:
        # NNCF's documentation shows these keys here, although NNCF refuses them too.
        misplaced = [key for key in ("mode", "bits", "signed", "per_channel") if key in values]
        if misplaced:
            raise ValueError(f'{", ".join(misplaced)}: belongs in "weights" or "activations", or in both')
        return values
