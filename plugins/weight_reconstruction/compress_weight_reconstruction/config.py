"""The config section of weight reconstruction, and the object that carries its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from torch import nn

from compress_core import AlgorithmConfig, Count, InitArgs, InitializerConfig, Scopes


class WeightReconstructionInitArgs(InitArgs):
    """Data for weight reconstruction."""


class WeightReconstructionConfig(InitializerConfig):
    """Section `initializer.weight_reconstruction`."""

    num_samples: Count = Field(
        256, ge=0, description="samples to reconstruct with, rounded to the nearest whole number of batches; 0 = off"
    )
    guard: bool | SkipJsonSchema[Callable[[nn.Module], Any]] = Field(
        False,
        description="metric, function (model) -> number, larger is better; true uses that of ModelEvaluationArgs. "
        "If the metric gets worse, weights and statistics are rolled back",
    )
    ignored_scopes: Scopes = Field(default_factory=list, description="layers and batch norms to leave unchanged")
    damping: float = Field(
        0.1, gt=0, description="how strongly weights are held at their old values, relative to the inputs' power"
    )
    positions: Count = Field(
        16, ge=1, description="positions of each sample's output that count, of convolutions and of sequences"
    )
    memory: float = Field(
        1.5,
        gt=0,
        description="GiB for what the forwards hold of all samples at once; if that is not enough, the first layers "
        "are solved with fewer samples",
    )


def settings_for_choosing(section: AlgorithmConfig) -> WeightReconstructionConfig:
    """Returns the settings with which data chooses what goes: those of the section's own reconstruction, or defaults.

    Reconstruction itself may be off (`num_samples` 0); choosing then takes the default number of samples.
    """
    given = section.initializer.shared("weight_reconstruction")
    if not isinstance(given, WeightReconstructionConfig):
        return WeightReconstructionConfig()
    if given.num_samples:
        return given
    return given.model_copy(update={"num_samples": WeightReconstructionConfig().num_samples})
