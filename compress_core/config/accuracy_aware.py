"""The top-level section `accuracy_aware_training`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from compress_core.config.sections import Count, Section
from compress_core.errors import Problem

PATH = "accuracy_aware_training"
ADAPTIVE = "adaptive_compression_level"

OF_THE_SEARCH = (
    "algorithm",
    "initial_training_phase_epochs",
    "patience_epochs",
    "initial_compression_rate_step",
    "compression_rate_step_reduction_factor",
    "lr_reduction_factor",
    "minimal_compression_rate_step",
)
"""Values of `params` that only the search for a level reads."""


class AccuracyAwareParams(Section):
    """Section `accuracy_aware_training.params`."""

    maximal_relative_accuracy_degradation: float | None = Field(
        None,
        description="how much of its metric the model may lose, in percent of the uncompressed model's; 1 if neither "
        "this nor the absolute loss is given; negative: it has to gain as much",
    )
    maximal_absolute_accuracy_degradation: float | None = Field(
        None, description="how much of its metric the model may lose, in units of the metric"
    )
    maximal_total_epochs: Annotated[Count, Field(ge=1)] = Field(10000, description="most epochs of training, in all")
    algorithm: str | None = Field(
        None, description="name of the algorithm whose level moves; required if several have a level"
    )
    initial_training_phase_epochs: Annotated[Count, Field(ge=0)] = Field(
        5, description="most epochs at the config's own schedule, before the level moves"
    )
    patience_epochs: Annotated[Count, Field(ge=1)] = Field(
        3, description="epochs at a level after which it is given up if the accuracy has not been reached"
    )
    initial_compression_rate_step: float = Field(0.1, gt=0, lt=1, description="first change of the level")
    compression_rate_step_reduction_factor: float = Field(
        0.5, gt=0, lt=1, description="factor on the change whenever its direction turns"
    )
    lr_reduction_factor: float = Field(
        0.5, gt=0, le=1, description="factor on the learning rate whenever the direction turns"
    )
    minimal_compression_rate_step: float = Field(
        0.025, gt=0, lt=1, description="the search ends when the change is smaller than this"
    )


class AccuracyAwareTraining(Section):
    """Section `accuracy_aware_training`: train until the accuracy holds, or search the highest level at which it does.

    It is read by `create_accuracy_aware_training_loop`.
    """

    mode: Literal["early_exit", "adaptive_compression_level"] = Field(
        description="early_exit: train until the compressed model is accurate enough; adaptive_compression_level: find "
        "the highest level at which it is"
    )
    params: AccuracyAwareParams = Field(default_factory=AccuracyAwareParams, description="how much, and how long")


def problems_of_accuracy_aware(section: AccuracyAwareTraining | None) -> Iterator[Problem]:
    """Finds values that contradict one another, or can have no effect in the mode."""
    if section is None:
        return
    looked_at = section.unread()
    params = looked_at.params
    given = params.model_fields_set
    relative, absolute = params.maximal_relative_accuracy_degradation, params.maximal_absolute_accuracy_degradation
    if relative is not None and absolute is not None:
        yield Problem(
            f"{PATH}.params",
            f"has a relative ({relative} %) and an absolute ({absolute}) maximal accuracy degradation; give one",
        )
    if looked_at.mode != ADAPTIVE:
        for name in (name for name in OF_THE_SEARCH if name in given):
            yield Problem(
                f"{PATH}.params.{name}",
                f"has no effect with mode '{looked_at.mode}' (value {getattr(params, name)!r}); remove it, or set mode "
                f"'{ADAPTIVE}'",
            )
    elif params.initial_compression_rate_step < params.minimal_compression_rate_step:
        yield Problem(
            f"{PATH}.params.initial_compression_rate_step",
            f"is {params.initial_compression_rate_step}, below minimal_compression_rate_step "
            f"{params.minimal_compression_rate_step}: the search would end before it begins; raise it",
        )
