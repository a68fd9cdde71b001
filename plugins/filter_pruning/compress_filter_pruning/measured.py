"""Importances that need data: what a choice of `filter_pruning.importance` gets then, and what it has to return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from compress_core import AlgorithmConfig, PluginError
from compress_core.channels import ChannelGroup
from compress_core.data.calibration import CalibrationData


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
