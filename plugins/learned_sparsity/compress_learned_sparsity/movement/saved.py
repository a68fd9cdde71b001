"""The saved form of the plan and of the state of movement sparsity, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import nn

from compress_core import Plan
from compress_core.channels import InputSpec, SavedGroup, check_channels, group_from_dict, group_to_dict
from compress_core.errors import StateError
from compress_core.saved import STRICT, Items, Positive, Whole, damaged, parsed
from compress_learned_sparsity.movement.channels import Structure
from compress_learned_sparsity.movement.structure import Linear


class _SavedLayer(BaseModel):
    model_config = STRICT
    weight: str
    bias: str
    block: tuple[Positive, Positive]
    output_dim: Annotated[int, Field(ge=0, le=1)]


class _SavedDetails(BaseModel):
    model_config = STRICT
    layers: Annotated[Items[_SavedLayer], Field(min_length=1)]
    groups: Items[SavedGroup]
    inputs: Items[dict[str, Any]]
    whole: dict[str, str]


class SavedMovement(BaseModel):
    """The state that `compress_state` saves.

    Attributes:
        frozen: Whether the masks are frozen.
        over: Whether the warm-up is over.
        initial: The threshold at the beginning of the warm-up, once it is known.
        factor: The present factor on the loss.
        gone: The channels that each group loses, as indices among its present channels.
    """

    model_config = STRICT
    frozen: bool
    over: bool
    initial: float | None
    factor: float = Field(ge=0)
    gone: Items[Items[Whole]]


def details(layers: list[Linear], structure: Structure) -> dict[str, Any]:
    """Returns the details of a plan, JSON-able."""
    return {
        "layers": [{**asdict(layer), "block": list(layer.block)} for layer in layers],
        "groups": [group_to_dict(group) for group in structure.groups],
        "inputs": [spec.to_dict() for spec in structure.inputs],
        "whole": structure.whole,
    }


def restored(plan: Plan, name: str, model: nn.Module) -> tuple[list[Linear], Structure]:
    """Returns what the details of a plan say, checked against the model.

    Raises:
        StateError: The details were not made by this algorithm, or for another model.
    """
    path = f"compression_state.algorithms.{name}.plan.details"
    saved = parsed(_SavedDetails, plan.details, path)
    layers = [Linear(entry.weight, entry.bias, entry.block, entry.output_dim) for entry in saved.layers]
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for number, layer in enumerate(layers):
        _check_layer(layer, f"{path}.layers.{number}", tensors)
    expected = [name for layer in layers for name in (layer.weight, layer.bias) if name]
    if list(plan.targets) != expected:
        raise damaged(path.replace(".details", ".targets"), f"must be {expected[:3]} and so on")
    groups = []
    for number, entry in enumerate(saved.groups):
        entry.check(f"{path}.groups.{number}", model)
        groups.append(group_from_dict(plan.details["groups"][number]))
        check_channels(groups[-1], f"{path}.groups.{number}")
    inputs = [InputSpec.from_dict(entry, f"{path}.inputs.{i}") for i, entry in enumerate(saved.inputs)]
    return layers, Structure(groups, inputs, dict(saved.whole))


def _check_layer(layer: Linear, path: str, tensors: Mapping[str, nn.Parameter]) -> None:
    weight = tensors.get(layer.weight)
    fits = weight is not None and weight.ndim == 2
    if fits and weight is not None:
        fits = all(size % step == 0 for size, step in zip(weight.shape, layer.block, strict=True))
        bias = tensors.get(layer.bias)
        outputs = weight.shape[layer.output_dim]
        fits = fits and (not layer.bias or (bias is not None and tuple(bias.shape) == (outputs,)))
    if not fits:
        raise StateError(
            f"{path}: compression_state does not fit this model: there is no weight '{layer.weight[:80]}' of two "
            f"dimensions that blocks of {layer.block} divide, with the bias '{layer.bias[:80]}'. Build the model as it "
            "was before compression"
        )


def checked_state(state: Mapping[str, Any], name: str, structure: Structure) -> SavedMovement:
    """Returns the state after validating it.

    Raises:
        StateError: `state` was not returned by `compress_state` for this model.
    """
    path = f"compression_state.algorithms.{name}.state"
    saved = parsed(SavedMovement, state, path)
    if len(saved.gone) not in (0, len(structure.groups)):
        raise damaged(f"{path}.gone", f"must be of {len(structure.groups)} groups, got {len(saved.gone)}")
    for number, (gone, group) in enumerate(zip(saved.gone, structure.groups, strict=False)):
        if len(set(gone)) != len(gone) or len(gone) >= group.size or any(channel >= group.size for channel in gone):
            raise damaged(f"{path}.gone.{number}", f"must be different channels below {group.size}, and not all")
    return saved
