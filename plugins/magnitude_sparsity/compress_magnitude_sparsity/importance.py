"""The importance of single weights: built in, a function of the weight, or measured with data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeGuard, cast

import torch
from torch import nn

from compress_core import AlgorithmConfig, Choice, ChoicePoint, ModelError, PluginError, choice
from compress_core.data.calibration import CalibrationData
from compress_magnitude_sparsity.config import IMPORTANCE
from compress_magnitude_sparsity.selection import RankedTensor, layer_scale

_RETURNS = ("factors", "masks")


@dataclass(frozen=True)
class ImportanceRequest:
    """What a `DataImportance` is asked at the creation of the model.

    Attributes:
        model: The model; it has the transforms of earlier stages, and must be left as it is.
        weights: Dotted names of the parameters that are masked.
        supports: For each of them which elements earlier stages have left, bool, of its shape.
        level: Share of the elements that will be zero.
        mode: `global`: one ranking over all weights; `local`: the level holds for each weight.
        steps: The value of `params.importance_steps`; 1 if the importance does not use it.
        data: The calibration data.
        config: The section of the algorithm, for settings of the author's own.
    """

    model: nn.Module
    weights: tuple[str, ...]
    supports: Mapping[str, torch.Tensor]
    level: float
    mode: Literal["global", "local"]
    steps: int
    data: CalibrationData
    config: AlgorithmConfig


class DataImportance(Protocol):
    """An importance that needs data. Any object with these members is one; there is nothing to import.

    Attributes:
        returns: What `measure` returns: `factors` broadcast to the weight, are finite and not negative, and
            |w| * factor is the importance, at the creation and at all later levels. `masks` are bool and of the
            weight's shape, true for what stays at the level asked for; later levels go by `normed_abs`.
        uses_steps: Whether it reads `steps`; otherwise `params.importance_steps` is refused.
    """

    @property
    def returns(self) -> Literal["factors", "masks"]:
        """See above."""

    @property
    def uses_steps(self) -> bool:
        """See above."""

    def measure(self, request: ImportanceRequest) -> Mapping[str, torch.Tensor]:
        """Returns a tensor for each weight; one that is left out gets the level by its own magnitudes alone."""


def check_importance(value: Any) -> str | None:
    """Returns what is wrong with a value of the choice point, or None."""
    if not hasattr(value, "measure"):
        if callable(value):
            return None
        return f"must be a function of a weight or have a method measure(request), got {type(value).__name__}"
    if getattr(value, "returns", None) not in _RETURNS:
        return f"has a method measure, so its `returns` is one of {_RETURNS}, got {getattr(value, 'returns', None)!r}"
    if not isinstance(getattr(value, "uses_steps", None), bool):
        return "has a method measure, so its `uses_steps` is True or False"
    return None


def absolute(weight: torch.Tensor) -> torch.Tensor:
    """Returns the absolute value of each element."""
    return weight.abs()


def normed_absolute(weight: torch.Tensor) -> torch.Tensor:
    """Returns the absolute value of each element, divided by the layer's L2 norm."""
    return weight.abs() / layer_scale(weight)


POINT = ChoicePoint(
    IMPORTANCE,
    "a function of a weight, of any shape and floating dtype, that returns the importance of each element, of the same "
    "shape, not negative, larger for what should stay; or an object with a method measure(request), which needs data: "
    "see compress_magnitude_sparsity.importance.DataImportance",
    check_importance,
)

CHOICES = [
    Choice(IMPORTANCE, "abs", absolute),
    Choice(IMPORTANCE, "normed_abs", normed_absolute),
]

Importance = Callable[[torch.Tensor], torch.Tensor] | DataImportance


def importance_named(name: str) -> Importance:
    """Returns the importance that a config names."""
    return cast("Importance", choice(name, IMPORTANCE))


def needs_data(importance: Importance) -> TypeGuard[DataImportance]:
    """Returns whether an importance is measured with data."""
    return hasattr(importance, "measure")


def ranked(name: str, weight: torch.Tensor, importance: Importance) -> RankedTensor:
    """Returns a weight with the importances of a function; those built in are computed while they are ranked.

    Raises:
        ModelError: The weight is NaN or infinite.
        PluginError: The function returns another shape, or importances that are negative or not finite.
    """
    if importance in (absolute, normed_absolute):
        return RankedTensor(name, weight, layer_scale(weight) if importance is normed_absolute else 1.0)
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"the weight '{name}' holds NaN or infinity; repair it before compression")
    # A copy, so that a function that works in place does not change the weight.
    found = cast("Callable[[torch.Tensor], torch.Tensor]", importance)(weight.clone())
    _refuse_wrong(name, found, lambda shape: shape == weight.shape, "importances of its shape")
    return RankedTensor(name, found.detach().to(weight.device))


def measured(importance: DataImportance, request: ImportanceRequest) -> dict[str, torch.Tensor]:
    """Returns what an importance has measured, checked.

    Raises:
        PluginError: It names other weights, or a tensor is not as `DataImportance` says.
    """
    found = dict(importance.measure(request))
    unknown = sorted(found.keys() - set(request.weights))
    if unknown:
        raise PluginError(f"{request.data.path}: measured '{unknown[0]}', which is not among the weights asked for")
    for name, tensor in found.items():
        support = request.supports[name]
        if importance.returns == "masks":
            if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tensor.shape) != (torch.bool, support.shape):
                raise PluginError(f"the mask of '{name}' has to be a bool tensor of shape {tuple(support.shape)}")
        else:
            _refuse_wrong(name, tensor, partial(_broadcasts, to=support.shape), "factors that broadcast to the weight")
    return {name: tensor.detach().to(request.supports[name].device) for name, tensor in found.items()}


def _refuse_wrong(name: str, found: Any, fits: Callable[[torch.Size], bool], what: str) -> None:
    """Raises a PluginError unless something is a tensor that fits, with finite floats that are not negative."""
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or not fits(found.shape):
        seen = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found)
        raise PluginError(f"the importance of '{name}' is {seen}; it has to be {what}, floating")
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise PluginError(f"the importance of '{name}' holds negative numbers, NaN or infinity; it has to be >= 0")


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) == len(to) and all(size in (1, wanted) for size, wanted in zip(shape, to, strict=True))


def compact(factor: torch.Tensor) -> torch.Tensor:
    """Returns a factor with size 1 in each dimension along which it is constant."""
    for dim in range(factor.ndim):
        first = factor.narrow(dim, 0, 1)
        if factor.shape[dim] > 1 and bool((factor == first).all()):
            factor = first
    return factor.clone()
