"""What is saved: the plan, and the state of a model on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from compress_core import Plan, StateError
from compress_core.channels import Costs, InputSpec
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.planning import PruningPlan


class SavedPruning(BaseModel):
    """What `compress_state` saves.

    Attributes:
        level: Level that was set last.
        frozen: Whether the masks stay as they are.
        gone: For each group the channels under masks, among those that there still are.
        shrunk: What has been removed for good, as `Shrinkage.to_dict` has it.
        groups: The groups as they are since then; empty when nothing has been removed.
        certificate: What the last proof has found.
    """

    level: float = Field(ge=0, lt=1)
    frozen: bool
    gone: list[list[int]]
    shrunk: dict[str, Any]
    groups: list[dict[str, Any]]
    certificate: dict[str, Any] | None = None

    @classmethod
    def checked(cls, state: Mapping[str, Any], name: str) -> SavedPruning:
        """Returns a state that has been checked.

        Raises:
            StateError: It is something else.
        """
        try:
            return cls.model_validate(dict(state))
        except ValidationError as error:
            raise StateError(f"compression_state.algorithms.{name}.state is not one of ours: {error}") from error


def saved_plan(plan: Plan, name: str) -> PruningPlan:
    """Returns what a plan was made from.

    Raises:
        StateError: It is something else.
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
