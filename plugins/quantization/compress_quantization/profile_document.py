"""The JSON document that describes what a device supports, and the checks of it.

A plugin contributes one with `Choice("quantization.target_device", "my-npu", document)`. See `docs/plugins.md` for an
example, and `profiles/*.json` for those that are built in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress_core import ChoicePoint
from compress_core.config.errors import did_you_mean, problems_of
from compress_core.errors import Problem
from compress_quantization.config import Mode
from compress_quantization.operators import ACTIVATION_NAMES, KINDS

TARGET_DEVICE = "quantization.target_device"


def _kind(name: str) -> str:
    if name not in KINDS:
        raise ValueError(f"'{name}' is no kind of operator.{did_you_mean(name, KINDS)} There are: {', '.join(KINDS)}")
    return name


def _activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"'{name}' is no activation function.{did_you_mean(name, ACTIVATION_NAMES)}")
    return name


Kind = Annotated[str, AfterValidator(_kind)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SchemeDocument(_Strict):
    """Ways to quantize a tensor: any combination of the numbers of bits, modes and granularities.

    The first of each is the default. The other keys hold for all combinations.
    """

    bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(min_length=1, description="numbers of bits, 2 to 8")
    modes: list[Mode] = Field(min_length=1, description="symmetric, asymmetric")
    granularities: list[Literal["per_channel", "per_tensor"]] = Field(
        min_length=1, description="per_channel, per_tensor"
    )
    signed: bool | None = Field(
        None, description="whether symmetric grids have values below zero; without it, the data decides"
    )
    narrow_range: bool | None = Field(
        None,
        description="whether symmetric grids leave out one integer, -128 of a signed one with 8 bits; without it, "
        "those of 8-bit weights do",
    )
    smallest_scale: float = Field(
        0.0, ge=0, le=1, description="smallest distance of two values of a grid; calibration and training keep to it"
    )

    @model_validator(mode="after")
    def _means_something(self) -> SchemeDocument:
        idle = [name for name in ("signed", "narrow_range") if getattr(self, name) is not None]
        if idle and "symmetric" not in self.modes:
            raise ValueError(f"{' and '.join(idle)}: means nothing without the mode symmetric; remove it")
        return self


class OperatorDocument(_Strict):
    """What a device supports for operators of some kinds."""

    kinds: list[Kind] = Field(min_length=1, description="kinds of operators")
    activations: list[str] = Field(
        default_factory=list, description="schemes for their inputs; without, these are not quantized"
    )
    depthwise_activations: list[str] = Field(
        default_factory=list, description="the same for depthwise convolutions; by default as for others"
    )
    weights: list[str] = Field(default_factory=list, description="schemes for their weights")
    inputs: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="positions of the inputs that are quantized; by default all"
    )
    output: Literal["free", "required", "decides"] = Field(
        "free",
        description="what an integer kernel demands of the output: nothing; a quantizer, which is then placed there; "
        "or a quantizer, and unless others demand one there, the inputs are not quantized either. A concatenation "
        "makes no demands: with `required`, a quantizer that others demand there stays while its inputs get the same, "
        "or each its own if a fused activation function makes some of them and none makes the others",
    )
    fused_activations: list[Annotated[str, AfterValidator(_activation)]] = Field(
        default_factory=list,
        description="activation functions behind which the quantizer of the output may stand: the runtime fuses them",
    )
    fuses_with: list[Kind] = Field(
        default_factory=list,
        description="kinds of operators with which the runtime fuses these: the input that one of them makes is not "
        "quantized",
    )


class ProfileDocument(_Strict):
    """What a device supports."""

    device: str = Field("", description="its name in messages; by default that of the choice")
    presets: Literal["always", "if_given", "never"] = Field(
        description="whether preset sets the modes: always, only if the config has one, or never"
    )
    half_range_weights: bool = Field(description="whether 8-bit weights may overflow, so that overflow_fix applies")
    unified_scales: list[Kind] = Field(
        default_factory=list, description="kinds of operators whose inputs have to share one quantizer"
    )
    quantized_gates: list[Literal["silu"]] = Field(
        default_factory=list,
        description="self-gated activation functions that the runtime computes with integers, as a sigmoid and a "
        "product: between two quantizers, the model computes x * q(sigmoid(x)), where q rounds to multiples of 1/255",
    )
    schemes: dict[str, SchemeDocument] = Field(min_length=1, description="the schemes by a name of your choice")
    operators: list[OperatorDocument] = Field(
        min_length=1, description="the operators that are computed with integers; others are not quantized"
    )


def check_document(value: Any) -> str | None:
    """Returns everything that is wrong with the description of a device, or None."""
    if not isinstance(value, Mapping):
        return f"must be a mapping, got {type(value).__name__}"
    problems: list[Problem] = []
    try:
        ProfileDocument.model_validate(dict(value))
    except ValidationError as error:
        problems += problems_of(error, ProfileDocument, "")
    problems += _wrong_names(value)
    if not problems:
        return None
    return "is wrong: " + "; ".join(f"{problem.path}: {problem.message.rstrip('.')}" for problem in problems)


def _wrong_names(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields schemes that are not described, and kinds that are described twice, as far as the types are right."""
    schemes, operators = document.get("schemes"), document.get("operators")
    if not isinstance(schemes, Mapping) or not isinstance(operators, list):
        return
    entries = [(index, entry) for index, entry in enumerate(operators) if isinstance(entry, Mapping)]
    for index, entry in entries:
        for key in ("activations", "depthwise_activations", "weights"):
            for name in _strings(entry.get(key)):
                if name not in schemes:
                    hint = did_you_mean(name, map(str, schemes))
                    yield Problem(f"operators.{index}.{key}", f"'{name}' is not among the schemes.{hint}")
    counts = Counter(kind for _, entry in entries for kind in _strings(entry.get("kinds")))
    for kind, number in counts.items():
        if number > 1:
            yield Problem("operators", f"'{kind}' is described twice; merge the entries")


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


POINT = ChoicePoint(
    TARGET_DEVICE,
    "what the device supports, as a JSON document with the keys of "
    "compress_quantization.profile_document.ProfileDocument",
    check_document,
)
