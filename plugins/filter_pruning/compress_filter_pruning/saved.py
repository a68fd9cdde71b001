"""The saved form of the plan and of the state of filter pruning, checked against the model before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import nn

from compress_core import Plan, StateError
from compress_core.channels import Costs, InputSpec, SavedGroup, Shrinkage, check_channels, parameter_costs, shrinkage
from compress_core.saved import STRICT, Items, Positive, Whole, damaged, parsed
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.latency_model import LatencyModel
from compress_filter_pruning.planning import PruningPlan


class _SavedGroup(SavedGroup):
    name: str
    full_size: Positive
    step: Positive


class _SavedDetails(BaseModel):
    model_config = STRICT
    groups: Annotated[Items[_SavedGroup], Field(min_length=1)]
    operations: dict[str, Any]
    parameters: dict[str, Any]
    inputs: Items[dict[str, Any]]
    latency: dict[str, Any] | None = None


class SavedRanking(BaseModel):
    """A ranking that was searched for or read, see `compress_filter_pruning.ranking.Ranking`."""

    model_config = STRICT
    coefficients: dict[str, tuple[float, float]]
    tried: Whole
    measure: str
    value: float | None
    unweighted: float | None


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
        ranking: What a search has found, if there was one.
    """

    level: float = Field(ge=0, lt=1)
    frozen: bool
    gone: Items[Items[Whole]]
    shrunk: dict[str, Any]
    groups: Items[dict[str, Any]]
    certificate: dict[str, Any] | None = None
    time: tuple[Whole, Whole] | None = None
    measured: Items[Items[float]] | None = None
    ranking: SavedRanking | None = None

    def check_groups(self, groups: Sequence[PruningGroup], path: str) -> None:
        """Checks the masked channels and the importances against the present groups.

        Raises:
            StateError: There are more or fewer groups or channels, or a channel occurs twice.
        """
        for name, entries in {"gone": self.gone, "measured": self.measured}.items():
            if entries is not None and len(entries) != len(groups):
                raise damaged(f"{path}.{name}", f"is of another number of groups, {len(entries)} and not {len(groups)}")
        for number, (gone, group) in enumerate(zip(self.gone, groups, strict=True)):
            if len(set(gone)) != len(gone) or len(gone) >= group.size or any(c >= group.size for c in gone):
                raise damaged(
                    f"{path}.gone.{number}", f"must be different channels below {group.size}, and not all of them"
                )
        for number, (values, group) in enumerate(zip(self.measured or (), groups, strict=False)):
            if len(values) != group.size:
                raise damaged(f"{path}.measured.{number}", f"holds {len(values)} importances for {group.size} channels")


def removed_groups(
    model: nn.Module, groups: Sequence[PruningGroup], shrunk: Shrinkage, saved: Sequence[Any], path: str
) -> list[PruningGroup]:
    """Returns the groups after a permanent removal, computed from those before.

    The state says it twice, what was removed and what is left of each group, and both have to say the same: masks
    of other channels than the weights have would be wrong without an error.

    Args:
        model: The model before the removal.
        groups: Its groups.
        shrunk: What is removed.
        saved: The groups in the state.
        path: Path of the state.

    Raises:
        StateError: They do not fit together.
    """
    if not shrunk:
        if saved:
            raise damaged(f"{path}.groups", f"has {len(saved)} groups, and nothing was removed")
        return list(groups)
    shrunk.check(model, f"{path}.shrunk")
    gone = [_gone(group, shrunk, path) for group in groups]
    expected = shrinkage(model, [(group.channels, lost) for group, lost in zip(groups, gone, strict=True)])
    own = {member.parameter for group in groups for member in group.channels.members}
    for name in sorted(own):
        if {**expected.kept.get(name, {})} != {**shrunk.kept.get(name, {})}:
            raise damaged(f"{path}.shrunk.tensors.{name}", "does not lose the channels that the other tensors lose")
    if {**expected.attributes} != {**shrunk.attributes}:
        raise damaged(f"{path}.shrunk.attributes", f"has to be {expected.attributes}, got {shrunk.attributes}")
    left = [group.shrunk(shrunk, lost) for group, lost in zip(groups, gone, strict=True)]
    if len(saved) != len(left):
        raise damaged(f"{path}.groups", f"is of another number of groups, {len(saved)} and not {len(left)}")
    for number, (group, entry) in enumerate(zip(left, saved, strict=True)):
        for key, value in group.to_dict().items():
            if entry.get(key, value if key in ("whole_heads", "attributes") else None) != value:
                before = f"{path.removesuffix('.state')}.plan.details.groups.{number}"
                raise damaged(f"{path}.groups.{number}.{key}", f"is not what the removal leaves of {before}")
    return left


def _gone(group: PruningGroup, shrunk: Shrinkage, path: str) -> set[int]:
    maker = group.makers[0]
    kept = shrunk.kept.get(maker.parameter, {}).get(maker.dim)
    if kept is None:
        return set()
    if kept[-1] >= len(maker.channels):
        raise damaged(
            f"{path}.shrunk.tensors.{maker.parameter}", f"dimension {maker.dim} is {len(maker.channels)} long"
        )
    return set(range(group.size)) - set(maker.channels[kept].tolist())


def saved_plan(plan: Plan, name: str, model: nn.Module, target_key: str) -> PruningPlan:
    """Returns the pruning plan in the details of a plan, checked against the model.

    Args:
        plan: The plan.
        name: Name of the algorithm.
        model: The model, as it was when the plan was made.
        target_key: The key of the target, see `FilterPruningParams.target_key`.

    Raises:
        StateError: The details were not made by this algorithm, or for another model.
    """
    path = f"compression_state.algorithms.{name}.plan.details"
    details = parsed(_SavedDetails, plan.details, path)
    for number, entry in enumerate(details.groups):
        _check_group(entry, f"{path}.groups.{number}", model)
    groups = [PruningGroup.from_dict(number, entry) for number, entry in enumerate(plan.details["groups"])]
    for group in groups:
        check_channels(group.channels, f"{path}.groups.{group.number}")
    full = [group.full_size for group in groups]
    operations = Costs.from_dict(details.operations, full, f"{path}.operations")
    parameters = Costs.from_dict(details.parameters, full, f"{path}.parameters")
    if parameters.to_dict() != parameter_costs(model, [group.channels for group in groups]).to_dict():
        raise damaged(f"{path}.parameters", "are not those of this model")
    inputs = [InputSpec.from_dict(entry, f"{path}.inputs.{i}") for i, entry in enumerate(details.inputs)]
    latency = None if details.latency is None else LatencyModel.from_dict(details.latency, full, f"{path}.latency")
    if latency is None and target_key == "pruning_latency_target":
        raise StateError(
            f"{path}.latency: there is none, and the target is pruning_latency_target; resume with the target that the "
            "state was saved with"
        )
    return PruningPlan(groups, dict(plan.skipped), operations, parameters, inputs, latency)


def _check_group(group: _SavedGroup, path: str, model: nn.Module) -> None:
    group.check(path, model)
    makers = [member.parameter for member in group.members if member.role == "MAKES"]
    if not makers or makers[0] != group.name:
        raise damaged(f"{path}.name", f"must be the first weight that makes the channels, {makers[:1]}")
    if group.full_size != group.size:
        raise damaged(f"{path}.full_size", f"must be the size {group.size}, got {group.full_size}")


def saved_state(state: Mapping[str, Any], path: str) -> SavedPruning:
    """Returns the state after validating it.

    Raises:
        StateError: `state` was not returned by `compress_state`.
    """
    return parsed(SavedPruning, state, path)
