"""The saved form of the plan and of the state of quantization, checked against the model before it is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from torch import nn

from compress_core import Plan, StateError
from compress_core.errors import CompressionError
from compress_core.saved import STRICT, Items, Whole, damaged, parsed, shown
from compress_core.transforms.activation_functions import activation_called
from compress_core.transforms.places import CallOutput, CallPattern
from compress_quantization.plan import GATE_SPEC, PlannedQuantizer
from compress_quantization.precision.chosen import SavedPrecision

_Path = Items[Whole | str]

# Scales of activations have one value for each channel, which no tensor of the model tells; together they are small.
_MOST_ACTIVATION_SCALES = 1 << 20


class _SavedPlace(BaseModel):
    model_config = STRICT
    kind: Literal["module_input", "module_output", "call_input", "call_output"]
    module: str
    function: str | None = None
    calls: CallPattern | None = None
    argument: _Path | None = None
    item: _Path | None = None


class _SavedRange(BaseModel):
    model_config = STRICT
    type: str
    num_init_samples: Whole
    percentiles: tuple[float, float] | None


class _SavedQuantizer(BaseModel):
    model_config = STRICT
    name: str
    group: Literal["weights", "activations"]
    spec: dict[str, Any]
    shape: Items[Annotated[int, Field(ge=1, le=1 << 31)]]
    parameter: str
    places: Items[_SavedPlace]
    initial_range: _SavedRange
    is_gate: bool = False


class _SavedDetails(BaseModel):
    model_config = STRICT
    quantizers: Annotated[Items[_SavedQuantizer], Field(min_length=1)]
    potential: dict[Literal["weights", "activations"], Whole]


class SavedQuantization(BaseModel):
    """The state that `compress_state` saves.

    Attributes:
        signed: Name of a quantizer -> whether its grid has values below zero.
        enabled: Name -> whether it is on.
        frozen: Name -> whether its scale or range does not learn.
        unreached: Names of quantizers of activations that stay off.
        calibrated: Whether activations were calibrated on data.
        staging: Which groups are on, with staged quantization.
        precision: The numbers of bits that a method has chosen.
    """

    signed: dict[str, bool]
    enabled: dict[str, bool]
    frozen: dict[str, bool]
    unreached: Items[str]
    calibrated: bool
    staging: dict[str, Any] | None
    precision: SavedPrecision | None = None

    @classmethod
    def checked(cls, state: Mapping[str, Any], path: str, names: Collection[str]) -> SavedQuantization:
        """Returns the state after validating it.

        Raises:
            StateError: `state` was not returned by `compress_state` of a model with these quantizers.
        """
        saved = parsed(cls, state, path)
        for key, values in {"signed": saved.signed, "enabled": saved.enabled, "frozen": saved.frozen}.items():
            if values.keys() != set(names):
                strange = min(values.keys() ^ set(names))
                raise damaged(f"{path}.{key}", f"must name the quantizers of the plan; {shown(strange)} is in one only")
        strangers = [name for name in saved.unreached if name not in names]
        if strangers or len(set(saved.unreached)) != len(saved.unreached):
            raise damaged(f"{path}.unreached", f"must be quantizers of the plan, each once, got {shown(strangers[:1])}")
        return saved


def saved_quantizers(plan: Plan, name: str, model: nn.Module) -> tuple[list[PlannedQuantizer], dict[str, int]]:
    """Returns the quantizers in the details of a plan, checked against the model, and their potential numbers.

    Args:
        plan: The plan.
        name: Name of the algorithm.
        model: The model, as it was when the plan was made.

    Raises:
        StateError: The details were not made by this algorithm, or for another model.
    """
    root = f"compression_state.algorithms.{name}.plan"
    path = f"{root}.details"
    details = parsed(_SavedDetails, plan.details, path)
    if missing := {"weights", "activations"} - details.potential.keys():
        raise damaged(f"{path}.potential.{min(missing)}", "is required")
    _check_sizes(details.quantizers, f"{path}.quantizers", model)
    found = []
    for number, entry in enumerate(plan.details["quantizers"]):
        place = f"{path}.quantizers.{number}"
        try:
            found.append(PlannedQuantizer.from_dict(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(place, f"is no quantizer ({error})") from error
        _check_settings(found[-1], place)
    names = [quantizer.name for quantizer in found]
    if len(set(names)) != len(names) or list(plan.targets) != names:
        number = next((i for i, pair in enumerate(zip(names, plan.targets, strict=False)) if pair[0] != pair[1]), 0)
        raise damaged(f"{path}.quantizers.{number}.name", f"must be the name in {root}.targets, each once")
    for group, number in details.potential.items():
        if number < sum(quantizer.group == group for quantizer in found):
            raise damaged(f"{path}.potential.{group}", f"is less than the plan has, got {number}")
    return found, {group: details.potential[group] for group in ("weights", "activations")}


def _check_settings(quantizer: PlannedQuantizer, path: str) -> None:
    spec = quantizer.spec
    if not 2 <= spec.bits <= 8:
        raise damaged(f"{path}.spec.bits", f"must be 2 to 8, got {spec.bits}")
    if spec.mode == "asymmetric" and (spec.signed is not None or spec.narrow_range):
        raise damaged(f"{path}.spec", "sets signed or narrow_range, which the mode asymmetric does not have")
    if not 0 <= spec.smallest_scale <= 1:
        raise damaged(f"{path}.spec.smallest_scale", f"must be between 0 and 1, got {spec.smallest_scale}")
    if not spec.per_channel and math.prod(quantizer.shape) != 1:
        raise damaged(f"{path}.shape", f"must be ones without per_channel, got {list(quantizer.shape)}")
    if bool(quantizer.parameter) != (quantizer.group == "weights") or bool(quantizer.places) == bool(
        quantizer.parameter
    ):
        raise damaged(path, "must have a parameter in the group 'weights', and places in 'activations'")
    _check_gate(quantizer, path)
    try:
        quantizer.initial_range.to_config()
    except (CompressionError, ValueError) as error:
        raise damaged(f"{path}.initial_range", f"is no range ({str(error).splitlines()[0]})") from error


def _check_gate(quantizer: PlannedQuantizer, path: str) -> None:
    if quantizer.is_gate != quantizer.name.endswith("|GATE"):
        raise damaged(f"{path}.is_gate", "must be true for names that end with |GATE, and only for these")
    if not quantizer.is_gate:
        return
    if quantizer.spec != GATE_SPEC or quantizer.shape != (1,):
        raise damaged(path, "must have 8 bits, unsigned and symmetric, and one scale, because it is a gate")
    functions = [place.function if isinstance(place, CallOutput) else "" for place in quantizer.places]
    if [activation_called(function) for function in functions] != ["silu"]:
        raise damaged(f"{path}.places", "must be the output of one call of silu, because it is a gate")


def _check_sizes(quantizers: Sequence[_SavedQuantizer], path: str, model: nn.Module) -> None:
    """Checks everything that decides how large the quantizers become, before they are made."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    most = max(_MOST_ACTIVATION_SCALES, sum(parameter.numel() for parameter in model.parameters()))
    scales, weights = 0, set()
    for number, entry in enumerate(quantizers):
        place = f"{path}.{number}"
        absent = [entry.parameter] if entry.parameter and entry.parameter not in parameters else []
        absent += [item.module for item in entry.places if item.module not in modules]
        if absent:
            raise StateError(
                f"{place}: compression_state does not fit this model: '{entry.name}' is quantized there, and the model "
                f"has no '{absent[0]}'. Build the model as it was when the state was saved"
            )
        if sum(size > 1 for size in entry.shape) > 1:
            raise damaged(f"{place}.shape", f"must have one dimension that is not 1, got {entry.shape[:8]}")
        if entry.parameter:
            if entry.parameter in weights:
                raise damaged(f"{place}.parameter", f"'{entry.parameter}' has a quantizer already")
            weights.add(entry.parameter)
            shape = parameters[entry.parameter].shape
            fits = len(entry.shape) in (0, len(shape)) or math.prod(entry.shape) == 1
            if not fits or any(a not in (1, b) for a, b in zip(entry.shape, shape, strict=False)):
                raise damaged(f"{place}.shape", f"must fit the weight, {list(shape)}, got {entry.shape[:8]}")
            continue
        scales += math.prod(entry.shape)
        if scales > most:
            raise damaged(f"{place}.shape", f"brings the scales of activations beyond {most}, got {entry.shape[:8]}")
