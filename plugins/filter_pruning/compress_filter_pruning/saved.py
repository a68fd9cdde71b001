"""The saved form of the plan and of the state of filter pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from compress_core import Plan, StateError
from compress_core.channels import Costs, InputSpec
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.planning import PruningPlan


class SavedPruning(BaseModel):
    """The state that `compress_state` saves.

    Attributes:
        level: Level that was set last.
        frozen: Whether the masks are frozen.
        gone: The masked channels of each group, as indices among its present channels.
        shrunk: What has been removed permanently, as returned by `Shrinkage.to_dict`.
        groups: The groups after the removal; empty if nothing has been removed.
        certificate: The result of the last comparison with the masked model.
        time: Epoch and finished optimizer steps when the schedule computed the masks.
        measured: Importances of the present channels of each group, if they were measured on data.
    """

    level: float = Field(ge=0, lt=1)
    frozen: bool
    gone: list[list[int]]
    shrunk: dict[str, Any]
    groups: list[dict[str, Any]]
    certificate: dict[str, Any] | None = None
    time: tuple[int, int] | None = None
    measured: list[list[float]] | None = None

    @classmethod
    def checked(cls, state: Mapping[str, Any], name: str) -> SavedPruning:
        """Returns the state after validating it.

        Raises:
            StateError: `state` was not returned by `compress_state`.
        """
        try:
            return cls.model_validate(dict(state))
        except ValidationError as error:
            raise StateError(f"compression_state.algorithms.{name}.state is not one of ours: {error}") from error


def saved_plan(plan: Plan, name: str) -> PruningPlan:
    """Returns the pruning plan in the details of a plan.

    Raises:
        StateError: The details were not made by this algorithm.
    """
    details = plan.details
    try:
        return PruningPlan(
            [PruningGroup.from_dict(number, entry) for number, entry in enumerate(details["groups"])],
            dict(plan.skipped),
            Costs.from_dict(details["operations"]),
            Costs.from_dict(details["parameters"]),
            [InputSpec.from_dict(entry) for entry in details["inputs"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"compression_state.algorithms.{name}.plan is not one of ours: {error}") from error
