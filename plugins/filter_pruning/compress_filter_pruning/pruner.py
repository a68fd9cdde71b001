"""`Pruner`: chooses, masks and removes channels of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress_core import UsageError
from compress_core.channels import (
    Certificate,
    ChannelGroup,
    Member,
    Shrinkage,
    averaged_module,
    check_optimizer,
    lost_channels,
    planned_shrinkage,
    renumbered,
    shrink_model,
    shrink_optimizer,
    smaller_group,
)
from compress_core.data.forwards import without_traces
from compress_core.transforms import get_weight_transform, raw_parameter
from compress_filter_pruning.cached import Importances
from compress_filter_pruning.config import FilterPruningParams
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.importance import channel_importance
from compress_filter_pruning.masks import add_masks, are_outdated, masked_parameters, write_masks
from compress_filter_pruning.planning import PruningPlan
from compress_filter_pruning.selection import Selector, least_important


class Pruner:
    """Chooses channels, masks them, and removes them.

    Args:
        model: The model.
        plan: Its groups and their costs.
        params: The settings.
        key: Name of the masks.
        announce: Called with a model after its tensors have become smaller.
        measured: Importances of the channels of each group that were measured on data; by default they follow from the
            weights.

    Attributes:
        model: The model.
        groups: The groups with their present channels.
        inputs: The inputs of the forward.
        gone: The masked channels of each group, as indices among its present channels.
        shrunk: What has been removed from the model permanently.
        stripped: What the last `strip` or `shrink` removed.
        certificate: How well the result of the last `strip` or `shrink` agreed with the masked model.
        measured: Measured importances of the present channels of each group, or None.
        costs: What levels are shares of, if not of channels: operations, parameters or seconds.
        coefficients: Name of a weight that makes channels -> (a, b): its filters count a * importance + b; or None.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        params: FilterPruningParams,
        key: str,
        announce: Callable[[nn.Module, Shrinkage], None],
        measured: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.model, self.groups, self.inputs = model, list(plan.groups), plan.inputs
        self.gone: list[list[int]] = [[] for _ in self.groups]
        self.shrunk = self.stripped = Shrinkage()
        self.certificate: Certificate | None = None
        self.measured = None if measured is None else list(measured)
        self.coefficients: Mapping[str, tuple[float, float]] | None = None
        self.costs = plan.costs(params.target_key)
        self._operations, self._parameters = plan.operations, plan.parameters
        self._params, self._key, self._announce = params, key, announce
        self._filters = Importances(params.filter_importance)
        add_masks(model, self._masked(), key)

    # Figures.

    @property
    def counts_operations(self) -> bool:
        """Whether levels are shares of floating point operations, instead of channels."""
        return self._params.target_key == "pruning_flops_target"

    @property
    def counts_parameters(self) -> bool:
        """Whether levels are shares of parameters."""
        return self._params.target_key == "pruning_parameters_target"

    @property
    def counts_latency(self) -> bool:
        """Whether levels are shares of the measured time of a forward."""
        return self._params.target_key == "pruning_latency_target"

    def full(self) -> list[int]:
        """Returns the number of channels of each group in the uncompressed model."""
        return [group.full_size for group in self.groups]

    def left(self) -> list[int]:
        """Returns the number of channels left in each group."""
        return [group.size - len(gone) for group, gone in zip(self.groups, self.gone, strict=True)]

    def operations(self, left: Sequence[int]) -> int:
        """Returns the floating point operations of a forward of one sample, exactly."""
        return self._operations.of(left)

    def parameters(self, left: Sequence[int]) -> int:
        """Returns the number of parameters of the model, exactly."""
        return self._parameters.of(left)

    def level(self) -> float:
        """Returns the pruned share, of operations, parameters, time or channels as levels count."""
        full, left = self.full(), self.left()
        return 1 - self._cost(left) / self._cost(full) if self._cost(full) else 0.0

    def reaches(self, level: float) -> bool:
        """Returns whether at least as much is pruned as a level asks for."""
        return self._cost(self.left()) <= self._cost(self._left_at(level))

    def left_at(self, level: float) -> list[int]:
        """Returns the number of channels left in each group at a level; ranks channels if all groups are compared."""
        return self._left_at(level)

    def shapes(self, left: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that parameters have with fewer channels, of those that then are smaller."""
        present = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        smaller = set()
        for group, number in zip(self.groups, left, strict=True):
            for member in group.channels.members if number < group.size else ():
                if member.parameter in present:
                    slices = int((member.channels >= 0).sum()) // group.size
                    present[member.parameter][member.dim] -= slices * (group.size - number)
                    smaller.add(member.parameter)
        return {name: tuple(present[name]) for name in sorted(smaller)}

    # Masks.

    def apply(self, level: float) -> None:
        """Masks the least important channels, as many as a level asks for."""
        self._select(self._left_at(level))

    def apply_each(self, levels: Mapping[int, float]) -> None:
        """Masks the least important channels of some groups, each to its own level.

        Args:
            levels: Number of a group -> its level; groups that are not in it do not change.
        """
        left = self.left()
        for number, level in levels.items():
            left[number] = min(self.groups[number].left(level), self.groups[number].size)
        self._select(left)

    def is_outdated(self) -> bool:
        """Returns whether weights without masks were loaded since the masks were computed."""
        return are_outdated(self.model, self._masked(), self._key)

    def mask(self, gone: list[list[int]]) -> None:
        """Masks exactly these channels of each group."""
        write_masks(self.model, self._masked(), gone, self._key)
        self.gone = gone

    # Removal.

    def pairs(self, removed_before: Shrinkage | None = None) -> list[tuple[ChannelGroup, set[int]]]:
        """Returns the groups with the channels that are masked, without tensors of layers that are gone.

        Args:
            removed_before: What other algorithms have removed from the model itself, which is stripped in place.

        Raises:
            UsageError: A layer that has the channels was replaced by one that does not have them.
        """
        sizes = {name: t.shape for name, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        pairs = []
        for own, masked in zip(self.groups, self.gone, strict=True):
            group, gone = _after(removed_before, own.channels, set(masked))
            members = tuple(m for m in group.members if not gone or self._is_there(m, sizes))
            pairs.append((replace(group, members=members), gone))
        return pairs

    def check_makers(self) -> None:
        """Raises UsageError if a layer that makes pruned channels was replaced or removed, and its mask is gone."""
        makers = {member.parameter for group in self.groups for member in group.makers}
        lost = [name for name in makers if get_weight_transform(self.model, name, self._key) is None]
        gone = sorted(name.rpartition(".")[0] for name in lost)
        if gone:
            raise UsageError(
                f"the layers {gone[:3]} have channels that are pruned, and were replaced or removed after "
                "create_compressed_model. Put them back; or replace layers first, and compress the model then"
            )

    def _is_there(self, member: Member, sizes: Mapping[str, torch.Size]) -> bool:
        shape = sizes.get(member.parameter, torch.Size())
        if len(shape) > member.dim and shape[member.dim] == len(member.channels):
            return True
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        if member.parameter not in sizes and member.parameter in names:
            return False  # the layer has become one with another one, which has the same member
        layer = member.parameter.rpartition(".")[0]
        if any(name == layer for name, _ in self.model.named_modules(remove_duplicate=False)):
            raise UsageError(
                f"the layer '{layer}' was replaced after create_compressed_model, and channels that it reads or has "
                f"are to be removed: dimension {member.dim} of '{member.parameter}' would have to have the size "
                f"{len(member.channels)}. Put it back; or replace layers first, and compress the model then"
            )
        return False

    def strip(self, model: nn.Module, removed_before: Shrinkage) -> None:
        """Removes the masked channels from a model, usually a copy of `self.model`.

        Args:
            model: The model.
            removed_before: What other algorithms have removed from it already.

        Raises:
            ShrinkError: The smaller model would fail or compute something else; the model is not changed.
        """
        self.stripped = self.shrunk
        if model is self.model:
            pairs = self.pairs(removed_before)
        else:
            pairs = [_after(removed_before, group, gone) for group, gone in self.pairs()]
        if any(gone for _, gone in pairs):
            removed, self.certificate = shrink_model(model, pairs, self.inputs)
            self.stripped = self.shrunk.then(removed_before).then(removed)
            self._announce(model, removed)

    def shrink(self, optimizer: torch.optim.Optimizer | None, ema: nn.Module | None) -> Certificate:
        """Removes the masked channels permanently; see `FilterPruning.shrink`."""
        pairs = self.pairs()
        if not any(self.gone):
            raise UsageError("no channel is masked, so there is nothing to shrink; set a pruning level first")
        with without_traces(self.model, parameters=False):
            removed, certificate = planned_shrinkage(self.model, pairs, self.inputs)
        if optimizer is not None:
            check_optimizer(optimizer, self.model, removed)
        for entry in [self.model] if ema is None else [self.model, averaged_module(ema, removed)]:
            removed.apply(entry)
        self._announce(self.model, removed)
        if optimizer is not None:
            shrink_optimizer(optimizer, self.model, removed)
        self.groups = [g.shrunk(removed, gone) for g, (_, gone) in zip(self.groups, pairs, strict=True)]
        if self.measured is not None:
            self.measured = [_without(v, gone) for v, (_, gone) in zip(self.measured, pairs, strict=True)]
        self.gone = [[] for _ in self.groups]
        self.shrunk = self.stripped = self.shrunk.then(removed)
        self.certificate = certificate
        return certificate

    def restore(self, shrunk: Shrinkage, groups: list[PruningGroup]) -> None:
        """Removes the channels that had been removed when a state was saved."""
        if shrunk:
            shrunk.apply(self.model)
            self.groups, self.shrunk, self.stripped = groups, shrunk, shrunk
            self._announce(self.model, shrunk)

    def shrink_plan(self) -> dict[str, Any]:
        """Returns the JSON-able plan of what `strip` removed from the plain model."""
        names = {member.parameter for group in self.groups for member in group.channels.members}
        return self.stripped.within(names).to_dict()

    # Implementation.

    def selector(self) -> Selector:
        """Returns the selector, which turns levels into numbers of channels."""
        return Selector(self.groups, self.costs, self._counts_costs, self._params.is_global)

    @property
    def _counts_costs(self) -> bool:
        return self._params.target_key != "pruning_target"

    def _masked(self) -> Any:
        return masked_parameters(self.model, self.groups, batch_norms=self._params.prune_batch_norms)

    def _cost(self, left: Sequence[int]) -> float:
        return self.costs.of(left) if self._counts_costs else sum(left)

    def _left_at(self, level: float) -> list[int]:
        # Removed channels cannot come back.
        left = self.selector().left(level, self._importances)
        return [min(number, group.size) for number, group in zip(left, self.groups, strict=True)]

    def _select(self, left: Sequence[int]) -> None:
        importances = self._importances()  # everything that can fail happens before the first mask is changed
        self.mask(
            [
                least_important(importance, group.size - number)
                for importance, group, number in zip(importances, self.groups, left, strict=True)
            ]
        )

    def _importances(self) -> list[torch.Tensor]:
        """Returns the importance of the channels of each group; comparable between groups for a global ranking."""
        return self.measured or [self._importance(group) for group in self.groups]

    def _importance(self, group: PruningGroup) -> torch.Tensor:
        weights = [
            (m.parameter, raw_parameter(self.model, m.parameter), m.dim, torch.from_numpy(m.channels))
            for m in group.makers
        ]
        return channel_importance(
            weights,
            group.size,
            self._filters.of,
            normalized=self._params.is_global,
            coefficients=self.coefficients,
        )


def _without(values: torch.Tensor, gone: set[int]) -> torch.Tensor:
    return values[[channel for channel in range(len(values)) if channel not in gone]]


def _after(removed: Shrinkage | None, group: ChannelGroup, gone: set[int]) -> tuple[ChannelGroup, set[int]]:
    if not removed:
        return group, gone
    lost = lost_channels(group, removed)
    left = renumbered(gone, lost)
    smaller = smaller_group(group, removed, lost)
    # The last channel of a group stays, although it is zero.
    return smaller, left if len(left) < smaller.size else left - {max(left)}
