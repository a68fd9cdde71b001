"""The algorithm `filter_pruning`: masks whole channels in training and removes them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core import (
    AlgorithmConfig,
    CompressionStage,
    ConfigError,
    LevelAlgorithm,
    ModelError,
    Plan,
    Stage,
    UsageError,
    for_one_process,
    hookimpl,
)
from compress_core.channels import Certificate, Shrinkage
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.data.forwards import without_traces
from compress_core.saved import damaged
from compress_core.transforms.python_state import copied
from compress_filter_pruning.attainable import check_attainable
from compress_filter_pruning.config import FilterPruningConfig
from compress_filter_pruning.config_checks import check_config
from compress_filter_pruning.footprints import without_channels
from compress_filter_pruning.latency import measured_latency
from compress_filter_pruning.latency_budget import corrected, stripped_and_checked, with_latency
from compress_filter_pruning.measured import importances_from_data, importances_from_state
from compress_filter_pruning.nncf_masks import masks_of_nncf
from compress_filter_pruning.planning import RANKED_DTYPES, PruningPlan, make_plan
from compress_filter_pruning.pruner import Pruner
from compress_filter_pruning.rankings import found_ranking, resumed_ranking, undecided
from compress_filter_pruning.saved import SavedPruning, removed_groups, saved_plan, saved_state
from compress_filter_pruning.schedules import Schedule, make_schedule
from compress_filter_pruning.statistics import FilterPruningStatistics, Latency, LatencyCheck, PrunedLayer, Ranking


class FilterPruning(LevelAlgorithm):
    """Structured pruning of channels that have to be removed together (Li et al. 2017; groups after Fang et al. 2023).

    The masks of a pruned channel cover the weights that produce it and the weights that read it, so the masked model
    computes what the smaller model will compute. Masks are computed from the stored weights whenever a level is set, so
    channels can come back until the masks are frozen or the channels are removed physically (`strip`, `shrink`).
    """

    name = "filter_pruning"
    Config: ClassVar[type[AlgorithmConfig]] = FilterPruningConfig
    stage = Stage.STRUCTURE
    controller_api = (
        "set_pruning_level",
        "pruning_level",
        "flops_pruning_level",
        "target_pruning_level",
        "maximal_compression_rate",
        "pruned_module_groups",
        "freeze",
        "frozen",
        "shrink",
        "shrink_plan",
        "measure_latency",
    )
    config: FilterPruningConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._schedule: Schedule | None = None
        self._plan: PruningPlan | None = None
        self._pruner: Pruner | None = None
        self._measured: list[torch.Tensor] | None = None
        self._ranking: Ranking | None = None
        # In a plan: what data will decide about the channels.
        self._undecided = ""
        self._requested = 0.0
        # Epoch and finished optimizer steps when the schedule's masks were computed; None if they are others.
        self._time: tuple[int, int] | None = None
        self._latency: Latency | None = None
        self._stripped_latency: LatencyCheck | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Schedules are functions, which pickle cannot store; they are made again from the config.
        return {**self.__dict__, "_schedule": self._schedule is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._schedule = make_schedule(self.config, self.target_pruning_level) if state["_schedule"] else None

    # Hooks.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        check_config(self.config, may_begin_above=context.config.root.searches_from_the_start)
        self._schedule = make_schedule(self.config, self.target_pruning_level)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Finds the groups of channels, and checks on copies of the model that it works without them."""
        if context.resuming:
            return self._resumed_plan(model, context)
        path, _ = context.section(self)
        targets, excluded = context.weight_targets(model, self, traces=True)
        for target in targets:
            weight = target.parameter
            if weight is not None and weight.dtype in RANKED_DTYPES and not bool(weight.isfinite().all()):
                raise ModelError(f"the weight '{target.name}' holds NaN or infinity; repair it before compression")
        trace = context.trace(model, path)
        device = next((parameter.device for parameter in model.parameters()), None)
        example = context.example(path, device)
        # A tied weight may have several names; traces give the first.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted = [names.get(id(target.parameter), target.name) for target in targets]
        found = make_plan(model, trace, self.config.params, wanted, excluded, example)
        if not found.groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.skipped.items())[:3])
            raise ConfigError(f"finds no channels that can be pruned ({reasons}); remove this section")
        if self._counts_latency:
            found = with_latency(model, found, self.config.params)
        check_attainable(found, self.config, path)
        self._plan = found
        if context.planning:
            self._undecided = undecided(self.config, path)
        if not self._undecided:
            self._measured = importances_from_data(model, found.groups, self.config, context, path)
            self._ranking = found_ranking(model, found, self.config, context, path)
            if self._counts_latency and self.config.target:
                trial = self._new_pruner(copied(model), found, lambda *_: None)
                self._plan = found = replace(found, latency=corrected(model, trial, self.config))
        weights = [member.parameter for group in found.groups for member in group.makers]
        return Plan(tuple(weights), found.skipped, found.to_dict())

    @hookimpl
    def compress_commit(self, model: nn.Module, context: Context) -> None:
        """Adds the masks, at the initial level."""
        assert self._plan is not None
        self._pruner = self._new_pruner(model, self._plan, self.context.shrunk)
        if not (context.resuming or self._undecided):
            self._apply(self.config.pruning_init, (0, 0))

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets the level of the epoch that begins."""
        assert self._schedule is not None
        level = self._schedule.level(clock.epoch)
        if level is not None and not self._frozen:
            self._follow_schedule(level, (clock.epoch, clock.step + 1))
        if clock.epoch >= self._schedule.freeze_epoch:
            self._frozen = True

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Compares the pruned share with the target."""
        pruner = self._active
        if pruner.reaches(self.target_pruning_level):
            return CompressionStage.FULLY_COMPRESSED
        begun = pruner.left() != pruner.full()
        return CompressionStage.PARTIALLY_COMPRESSED if begun else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self) -> FilterPruningStatistics:
        """Counts the remaining channels, operations and parameters."""
        pruner = self._active
        full, left = pruner.full(), pruner.left()
        layers = [
            PrunedLayer(name, group.number, filters, filters * now // group.full_size)
            for group, now in zip(pruner.groups, left, strict=True)
            for name, filters in group.full_filters.items()
        ]
        assert self._plan is not None
        return FilterPruningStatistics(
            layers=tuple(layers),
            skipped=self._plan.skipped,
            requested_level=self._requested,
            target_level=self.target_pruning_level,
            counts_flops=pruner.counts_operations,
            full_flops=pruner.operations(full),
            current_flops=pruner.operations(left),
            full_parameters=pruner.parameters(full),
            current_parameters=pruner.parameters(left),
            full_channels=sum(full),
            current_channels=sum(left),
            frozen=self._frozen,
            certificate=pruner.certificate,
            latency=self._latency,
            ranking=self._ranking,
            counts_parameters=pruner.counts_parameters,
            counts_latency=pruner.counts_latency,
            planned_latency=None if self._plan.latency is None else self._plan.latency.check,
            stripped_latency=self._stripped_latency,
        )

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts the model without the pruned channels, as they are now or at the target."""
        return without_channels(footprint, self._active, self.config.unread(), self._undecided, at_end=at_end)

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns level, masked channels and removed channels; the masks are in the model's `state_dict`."""
        pruner = self._active
        return SavedPruning(
            level=self._requested,
            time=self._time,
            frozen=self._frozen,
            gone=pruner.gone,
            shrunk=pruner.shrunk.to_dict(),
            groups=[group.to_dict() for group in pruner.groups] if pruner.shrunk else [],
            certificate=None if pruner.certificate is None else pruner.certificate.to_dict(),
            measured=None if pruner.measured is None else [values.tolist() for values in pruner.measured],
            ranking=None if self._ranking is None else asdict(self._ranking),
        ).model_dump()

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Removes and masks the same channels as when the state was saved."""
        path = f"compression_state.algorithms.{self.name}.state"
        saved, pruner = saved_state(state, path), self._active
        shrunk = Shrinkage.from_dict(saved.shrunk, f"{path}.shrunk")
        groups = removed_groups(pruner.model, pruner.groups, shrunk, saved.groups, path)
        saved.check_groups(groups, path)
        certificate = None
        if saved.certificate is not None:
            certificate = Certificate.from_dict(saved.certificate, f"{path}.certificate")
        measured = importances_from_state(self.config.params, saved.measured, path)
        ranking = resumed_ranking(self.config.params, saved.ranking, pruner.groups, path)
        pruner.restore(shrunk, groups)
        pruner.measured, pruner.certificate = measured, certificate
        self._ranking, pruner.coefficients = ranking, None if ranking is None else ranking.coefficients
        self._requested, self._time, self._frozen = saved.level, saved.time, saved.frozen
        pruner.mask(saved.gone)

    @hookimpl
    def compress_strip(self, model: nn.Module, context: Context) -> None:
        """Removes the masked channels; transforms of other algorithms are cut with their tensors."""
        pruner, before = self._active, context.removed_so_far
        if self._counts_latency and any(pruner.gone) and not before:
            self._stripped_latency = stripped_and_checked(pruner, model)
        else:
            pruner.strip(model, before)

    # What the controller offers.

    @property
    def pruning_level(self) -> float:
        """Measured share of the prunable channels that is pruned."""
        return 1 - sum(self._active.left()) / sum(self._active.full())

    @property
    def flops_pruning_level(self) -> float:
        """Counted share of the floating point operations that is pruned."""
        pruner = self._active
        return 1 - pruner.operations(pruner.left()) / pruner.operations(pruner.full())

    @property
    def target_pruning_level(self) -> float:
        """Level at the end of the schedule: of channels, operations, parameters or time, as the target counts."""
        return self.config.target

    @property
    def maximal_compression_rate(self) -> float:
        """Largest share that can be removed: of what the target counts, of the operations if that is channels."""
        return self._active.selector().most()

    @property
    def pruned_module_groups(self) -> dict[int, list[str]]:
        """Number of each group -> names of the layers that produce its channels."""
        return {group.number: group.modules for group in self._active.groups}

    @property
    def highest_level(self) -> float:
        """The highest level that leaves each group what it has to keep, in the unit that the target counts."""
        return self._active.selector().most_level()

    def level(self) -> float:
        """Returns the pruned share, of channels or operations as the target counts."""
        return self._active.level()

    def set_level(self, level: float) -> None:
        """Calls `set_pruning_level`."""
        self.set_pruning_level(level)

    def set_pruning_level(
        self, pruning_level: float | Mapping[int, float], run_batchnorm_adaptation: bool = False
    ) -> None:
        """Computes the masks for a level.

        Args:
            pruning_level: Share to prune, 0 <= level < 1: of the channels, or of the operations or parameters if
                the target counts these. A dict maps the numbers of groups to shares of their channels; groups
                that are not in it do not change.
            run_batchnorm_adaptation: Whether to adapt batch norm to the change.

        Raises:
            UsageError: A level is out of range, there is no such group, or the masks are frozen.
        """
        levels = pruning_level if isinstance(pruning_level, Mapping) else {0: pruning_level}
        for number, level in levels.items():
            self._check_level("pruning level", level)
            if number not in range(len(self._active.groups)):
                count = len(self._active.groups)
                raise UsageError(f"there is no group {number!r}; groups are 0 to {count - 1}: see pruned_module_groups")
        with self.context.batch_norm.adapted(run_batchnorm_adaptation):
            if isinstance(pruning_level, Mapping):
                self._active.apply_each(pruning_level)
                self._time = None
            else:
                self._apply(pruning_level)

    def shrink(self, optimizer: torch.optim.Optimizer | None = None, ema: nn.Module | None = None) -> Certificate:
        """Removes the masked channels permanently, in the middle of training.

        Parameters stay the same objects, so the optimizer can continue; its state of each element is sliced with them.
        A wrapper such as DistributedDataParallel has to be created again, and a compiled model compiles again.

        Args:
            optimizer: The optimizer, if it has a state already: SGD, Adam, AdamW, RMSprop and others that keep tensors
                of the parameters' shapes.
            ema: A copy of the compressed model, or a `torch.optim.swa_utils.AveragedModel` of it.

        Returns:
            How well the smaller model agrees with the masked one.

        Raises:
            ShrinkError: The smaller model would fail or compute something else.
            UsageError: No channel is masked, or optimizer or average do not fit. Nothing has been changed.
        """
        return self._active.shrink(optimizer, ema)

    @property
    def shrink_plan(self) -> dict[str, Any]:
        """What the last `strip` or `shrink` removed; JSON-able, for `compress_core.load_compressed_model`."""
        return self._active.shrink_plan()

    @for_one_process
    def measure_latency(self, rounds: int = 20) -> Latency:
        """Measures forwards of the masked model and of the stripped model in eval mode, alternating.

        Args:
            rounds: Number of forwards of each model.

        Raises:
            ShrinkError: The smaller model would fail or compute something else.
        """
        pruner = self._active
        with without_traces(pruner.model, parameters=False):
            self._latency = measured_latency(pruner.model, pruner.pairs(), pruner.inputs, rounds)
        return self._latency

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes the masks of filters, where those of a group agree; see `Algorithm.take_nncf`."""
        pruner = self._active
        gone, taken = masks_of_nncf(pruner.groups, pruner.gone, tensors)
        if taken:
            pruner.mask(gone)
            self._requested, self._time = self.pruning_level, None
        return dict.fromkeys(taken)

    # Implementation.

    @property
    def _active(self) -> Pruner:
        assert self._pruner is not None, "the algorithm has not been committed"
        self._pruner.check_makers()
        return self._pruner

    @property
    def _counts_latency(self) -> bool:
        return self.config.params.target_key == "pruning_latency_target"

    def _new_pruner(self, model: nn.Module, plan: PruningPlan, announce: Callable[..., None]) -> Pruner:
        pruner = Pruner(model, plan, self.config.params, self.name, announce, self._measured)
        pruner.coefficients = None if self._ranking is None else self._ranking.coefficients
        return pruner

    def _follow_schedule(self, level: float, time: tuple[int, int]) -> None:
        """Computes the masks for a level, unless they are those of this level and nothing was trained since.

        An initializer may have fitted the weights to them.
        """
        if (level, time) != (self._requested, self._time) or self._active.is_outdated():
            self._apply(level, time)

    def _apply(self, level: float, time: tuple[int, int] | None = None) -> None:
        self._active.apply(level)
        self._requested, self._time = level, time

    def _resumed_plan(self, model: nn.Module, context: Context) -> Plan:
        plan = context.saved_plans[self.name]
        self._plan = saved_plan(plan, self.name, model, self.config.params.target_key)
        makers = [member.parameter for group in self._plan.groups for member in group.makers]
        if list(plan.targets) != makers:
            raise damaged(f"compression_state.algorithms.{self.name}.plan.targets", f"must be {makers[:3]} and so on")
        path, config = context.section(self)
        for leaf, value, _ in config.given_leaves():
            context.ledger.record(f"{path}.{leaf}", value, "resumed: groups are those of the compression state")
        return plan
