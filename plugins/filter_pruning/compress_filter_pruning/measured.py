"""Importances that need data: what a choice of `filter_pruning.importance` gets then, and what it has to return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from compress_core import AlgorithmConfig, PluginError, StateError, choice
from compress_core.channels import ChannelGroup
from compress_core.contract.context import Context
from compress_core.data.calibration import CalibrationData
from compress_filter_pruning.config import IMPORTANCE, FilterPruningConfig, FilterPruningParams
from compress_filter_pruning.groups import PruningGroup


@dataclass(frozen=True)
class ImportanceRequest:
    """What an importance that needs data gets.

    Attributes:
        model: The uncompressed model; to be left as it is.
        groups: The groups of channels, with the dimensions of parameters that make and that read them.
        data: The calibration data.
        section: The section of filter pruning, with its `initializer`.
        comparable: Whether channels of different groups will be ranked together, so that values have to be comparable.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    data: CalibrationData
    section: AlgorithmConfig
    comparable: bool


@runtime_checkable
class DataImportance(Protocol):
    """An importance that is measured once, when the model is created, and decides from then on."""

    def measure(self, request: ImportanceRequest) -> Sequence[torch.Tensor]:
        """Returns the importance of each channel of each group, shape (channels,), larger for what should stay."""
        ...


def measured_importances(value: DataImportance, kind: str, request: ImportanceRequest) -> list[torch.Tensor]:
    """Returns what a choice measures, after checking it.

    Returns:
        For each group float64 on the CPU, shape (channels,).

    Raises:
        PluginError: Something else than one finite number for each channel was returned.
    """
    found = list(value.measure(request))
    if len(found) != len(request.groups):
        raise PluginError(
            f"the filter importance '{kind}' returned {len(found)} tensors for {len(request.groups)} groups"
        )
    return [_checked(entry, kind, group) for entry, group in zip(found, request.groups, strict=True)]


def _checked(found: object, kind: str, group: ChannelGroup) -> torch.Tensor:
    name = group.members[0].parameter
    if not isinstance(found, torch.Tensor) or found.shape != (group.size,):
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise PluginError(
            f"the filter importance '{kind}' returned {what} for the {group.size} channels of the group of '{name}'; "
            "one number each"
        )
    values = found.detach().double().cpu()
    if not bool(values.isfinite().all()):
        raise PluginError(f"the filter importance '{kind}' returned NaN or infinity for the group of '{name}'")
    return values


def importances_from_data(
    model: nn.Module, groups: Sequence[PruningGroup], config: FilterPruningConfig, context: Context, section: str
) -> list[torch.Tensor] | None:
    """Returns importances that need data, before anything is changed; None if `filter_importance` needs none."""
    params = config.params
    value = choice(params.filter_importance, IMPORTANCE)
    if not isinstance(value, DataImportance):
        return None
    data = context.calibration_data(f"{section}.params.filter_importance")
    request = ImportanceRequest(model, [group.channels for group in groups], data, config, params.is_global)
    return measured_importances(value, params.filter_importance, request)


def importances_from_state(
    params: FilterPruningParams, saved: Sequence[Sequence[float]] | None, path: str
) -> list[torch.Tensor] | None:
    """Returns the importances in a state; None if `filter_importance` needs none.

    Raises:
        StateError: It needs them, and there are none.
    """
    kind = params.filter_importance
    if not isinstance(choice(kind, IMPORTANCE), DataImportance):
        return None
    if saved is None:
        raise StateError(f"{path}.measured: there are none, and filter_importance '{kind}' needs them")
    return [torch.tensor(values, dtype=torch.float64) for values in saved]
