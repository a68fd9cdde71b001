"""The algorithm `filter_pruning`: whole channels under masks while training, really gone afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    CompressionStage,
    ConfigError,
    Plan,
    Stage,
    StateError,
    UsageError,
    hookimpl,
)
from compress_core.channels import (
    Certificate,
    ChannelGroup,
    Costs,
    InputSpec,
    Shrinkage,
    averaged_module,
    check_optimizer,
    planned_shrinkage,
    shrink_model,
    shrink_optimizer,
)
from compress_core.context import Context
from compress_core.schedules import Clock
from compress_core.snapshot import ModelSnapshot
from compress_core.transforms import raw_parameter
from compress_filter_pruning.config import FilterPruningConfig
from compress_filter_pruning.config_checks import check_config
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.importance import channel_importance
from compress_filter_pruning.latency import measured_latency
from compress_filter_pruning.masks import add_masks, masked_parameters, write_masks
from compress_filter_pruning.planning import make_plan
from compress_filter_pruning.saved import SavedPruning, saved_plan
from compress_filter_pruning.schedules import Schedule, make_schedule
from compress_filter_pruning.selection import Selector, least_important
from compress_filter_pruning.statistics import FilterPruningStatistics, Latency, PrunedLayer

Levels = float | Mapping[int, float]


class FilterPruning(Algorithm):
    """Structured pruning of groups of channels that belong together (Li et al. 2017; groups after Fang et al. 2023).

    Whatever makes a channel that is gone, and whatever reads it, is masked: the masked model computes what the smaller
    one is going to compute. Masks are computed from the stored weights whenever a level is set, so channels can come
    back until the masks are frozen or the channels are removed physically (`strip`, `shrink`).
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
        self._model: nn.Module | None = None
        self._context: Context | None = None
        self._schedule: Schedule | None = None
        self._groups: list[PruningGroup] = []
        self._skipped: dict[str, str] = {}
        self._operations = self._parameters = Costs.nothing()
        self._inputs: list[InputSpec] = []
        # For each group the channels under masks, counted among those that there still are.
        self._gone: list[list[int]] = []
        self._requested = 0.0
        self._frozen = False
        self._shrunk = Shrinkage()
        # What the last strip or shrink removed, from the uncompressed model on.
        self._stripped = Shrinkage()
        self._certificate: Certificate | None = None
        self._latency: Latency | None = None

    # Hooks.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        check_config(self.config)
        self._schedule = make_schedule(self.config, self._target)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Finds the groups of channels, and tries on copies whether the model bears that they go."""
        if context.resuming:
            return self._resumed_plan(model, context)
        path, _ = context.section(self)
        targets, excluded = context.weight_targets(model, self)
        trace = context.trace(model, path)
        found = make_plan(model, trace, self.config.params, [target.name for target in targets], excluded)
        if not found.groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.skipped.items())[:3])
            raise ConfigError(f"finds no channels that can be pruned ({reasons}); remove this section")
        self._groups, self._skipped, self._inputs = found.groups, found.skipped, found.inputs
        self._operations, self._parameters = found.operations, found.parameters
        self._check_attainable()
        return Plan(tuple(self._pruned_weights()), found.skipped, found.to_dict())

    @hookimpl
    def compress_commit(self, model: nn.Module, context: Context) -> None:
        """Adds the masks, at the initial level."""
        self._model, self._context = model, context
        self._gone = [[] for _ in self._groups]
        add_masks(model, self._masked(), self.name)
        if not context.resuming:
            self._apply(self.config.pruning_init)

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets the level of the epoch that begins."""
        assert self._schedule is not None
        level = self._schedule.level(clock.epoch)
        if level is not None and not self._frozen:
            self._apply(level)
        if clock.epoch >= self._schedule.freeze_epoch:
            self._frozen = True

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Compares what is gone with what the target asks for."""
        left = self._left_now()
        if self._cost(left) <= self._cost(self._left(self._target)):
            return CompressionStage.FULLY_COMPRESSED
        full = [group.full_size for group in self._groups]
        return CompressionStage.PARTIALLY_COMPRESSED if left != full else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self) -> FilterPruningStatistics:
        """Counts what is gone."""
        left = self._left_now()
        full = [group.full_size for group in self._groups]
        layers = [
            PrunedLayer(name, group.number, filters, filters * now // group.full_size)
            for group, now in zip(self._groups, left, strict=True)
            for name, filters in group.full_filters.items()
        ]
        return FilterPruningStatistics(
            layers=tuple(layers),
            skipped=self._skipped,
            requested_level=self._requested,
            target_level=self._target,
            counts_flops=self._counts_flops,
            full_flops=self._operations.of(full),
            current_flops=self._operations.of(left),
            full_parameters=self._parameters.of(full),
            current_parameters=self._parameters.of(left),
            full_channels=sum(full),
            current_channels=sum(left),
            frozen=self._frozen,
            certificate=self._certificate,
            latency=self._latency,
        )

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns level, masked channels, and what is gone for good; the masks are in the model's state_dict."""
        return SavedPruning(
            level=self._requested,
            frozen=self._frozen,
            gone=self._gone,
            shrunk=self._shrunk.to_dict(),
            groups=[group.to_dict() for group in self._groups] if self._shrunk else [],
            certificate=None if self._certificate is None else self._certificate.to_dict(),
        ).model_dump()

    @hookimpl
    def compress_load_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Makes the model as small as it was, and masks the same channels."""
        saved = SavedPruning.checked(state, self.name)
        shrunk = Shrinkage.from_dict(saved.shrunk)
        if shrunk:
            shrunk.apply(model)
            self._groups = [PruningGroup.from_dict(number, entry) for number, entry in enumerate(saved.groups)]
            self._shrunk = self._stripped = shrunk
        if [len(self._groups)] != [len(saved.gone)]:
            raise StateError(f"compression_state.algorithms.{self.name}.state is of another number of groups")
        self._requested, self._frozen = saved.level, saved.frozen
        self._certificate = None if saved.certificate is None else Certificate.from_dict(saved.certificate)
        self._mask(saved.gone)

    @hookimpl
    def compress_strip(self, model: nn.Module) -> None:
        """Makes tensors smaller; the other algorithms' transforms shrink with what they are for."""
        pairs = self._pairs()
        if not any(gone for _, gone in pairs):
            self._stripped = self._shrunk
            return
        shrinkage, self._certificate = shrink_model(model, pairs, self._inputs)
        self._stripped = self._shrunk.then(shrinkage)

    # What the controller offers.

    @property
    def pruning_level(self) -> float:
        """Share of the channels that may go which is gone; measured."""
        return 1 - sum(self._left_now()) / sum(group.full_size for group in self._groups)

    @property
    def flops_pruning_level(self) -> float:
        """Share of the floating point operations that is gone; counted."""
        return 1 - self._operations.of(self._left_now()) / self._full_operations

    @property
    def target_pruning_level(self) -> float:
        """Level at the end of the schedule."""
        return self._target

    @property
    def maximal_compression_rate(self) -> float:
        """Largest share of the floating point operations that can go."""
        return self._selector.most()

    @property
    def pruned_module_groups(self) -> dict[int, list[str]]:
        """Number of each group -> names of the layers that make its channels."""
        return {group.number: group.modules for group in self._groups}

    @property
    def compression_rate(self) -> float:
        """Share that is gone, of what the target counts; setting it sets the level and freezes the masks."""
        return self.flops_pruning_level if self._counts_flops else self.pruning_level

    @compression_rate.setter
    def compression_rate(self, rate: float) -> None:
        was_frozen, self._frozen = self._frozen, False
        try:
            self.set_pruning_level(rate)
        except BaseException:
            self._frozen = was_frozen
            raise
        self._frozen = True

    @property
    def frozen(self) -> bool:
        """Whether the masks stay as they are."""
        return self._frozen

    def freeze(self, freeze: bool = True) -> None:
        """Keeps the masks as they are, or lets them change again.

        Raises:
            UsageError: `freeze` is neither True nor False.
        """
        if not isinstance(freeze, bool):
            raise UsageError(f"freeze takes True or False, got {freeze!r}")
        self._frozen = freeze

    def set_pruning_level(self, pruning_level: Levels, run_batchnorm_adaptation: bool = False) -> None:
        """Computes the masks anew.

        Args:
            pruning_level: Share that goes, 0 <= level < 1: of the channels, or of the floating point operations where
                the config has `pruning_flops_target`. A dict gives each group, by number, a level of its own; groups
                that it leaves out stay as they are.
            run_batchnorm_adaptation: Whether to adapt batch norm to the change.

        Raises:
            UsageError: A level is out of range, there is no such group, or the masks are frozen.
        """
        if self._frozen:
            raise UsageError("the masks are frozen; call controller.freeze(False) before setting a level")
        levels = pruning_level if isinstance(pruning_level, Mapping) else {}
        for level in levels.values() if isinstance(pruning_level, Mapping) else [pruning_level]:
            if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level < 1:
                raise UsageError(f"a pruning level must be a number in [0, 1), got {level!r}")
        if unknown := [number for number in levels if number not in range(len(self._groups))]:
            raise UsageError(
                f"there is no group {unknown[0]!r}; groups are 0 to {len(self._groups) - 1}: see pruned_module_groups"
            )
        assert self._context is not None
        controller = self._context.controller
        assert controller is not None
        with controller.batchnorm_adapted(run_batchnorm_adaptation):
            if isinstance(pruning_level, Mapping):
                self._apply_each(pruning_level)
            else:
                self._apply(pruning_level)

    def shrink(self, optimizer: torch.optim.Optimizer | None = None, ema: nn.Module | None = None) -> Certificate:
        """Removes the masked channels for good, in the middle of training.

        Parameters stay the objects that they are, so the optimizer goes on; what it keeps for each element is sliced
        with them. A wrapper such as DistributedDataParallel has to be made anew, and a compiled model compiles again.

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
        model, pairs = self._active_model, self._pairs()
        if not any(gone for _, gone in pairs):
            raise UsageError("no channel is masked, so there is nothing to shrink; set a pruning level first")
        shrinkage, certificate = planned_shrinkage(model, pairs, self._inputs)
        if optimizer is not None:
            check_optimizer(optimizer, model, shrinkage)
        models = [model] if ema is None else [model, averaged_module(ema, shrinkage)]
        snapshots = [ModelSnapshot(entry) for entry in models]
        try:
            for entry in models:
                shrinkage.apply(entry)
        except BaseException:
            for snapshot in snapshots:
                snapshot.restore()
            raise
        if optimizer is not None:
            shrink_optimizer(optimizer, model, shrinkage)
        self._groups = [g.shrunk(shrinkage, gone) for g, (_, gone) in zip(self._groups, pairs, strict=True)]
        self._gone = [[] for _ in self._groups]
        self._shrunk = self._stripped = self._shrunk.then(shrinkage)
        self._certificate = certificate
        return certificate

    @property
    def shrink_plan(self) -> dict[str, Any]:
        """What the last `strip` or `shrink` removed; JSON-able, for `compress_core.load_compressed_model`."""
        names = {member.parameter for group in self._groups for member in group.channels.members}
        return self._stripped.within(names).to_dict()

    def measure_latency(self, rounds: int = 20) -> Latency:
        """Measures the forward of the masked model and of what `strip` would leave, in eval mode, in turns.

        Args:
            rounds: How often each runs.

        Raises:
            ShrinkError: The smaller model would fail or compute something else.
        """
        self._latency = measured_latency(self._active_model, self._pairs(), self._inputs, rounds)
        return self._latency

    # How it is done.

    @property
    def _target(self) -> float:
        params = self.config.params
        if params.pruning_flops_target is not None:
            return params.pruning_flops_target
        return 0.5 if params.pruning_target is None else params.pruning_target

    @property
    def _counts_flops(self) -> bool:
        return self.config.params.pruning_flops_target is not None

    @property
    def _selector(self) -> Selector:
        return Selector(self._groups, self._operations, self._counts_flops, self.config.params.all_weights)

    @property
    def _active_model(self) -> nn.Module:
        assert self._model is not None, "the algorithm has not been committed"
        return self._model

    @property
    def _full_operations(self) -> int:
        return self._operations.of([group.full_size for group in self._groups])

    def _pruned_weights(self) -> list[str]:
        return [member.parameter for group in self._groups for member in group.makers]

    def _masked(self) -> Any:
        batch_norms = self.config.params.prune_batch_norms
        return masked_parameters(self._active_model, self._groups, batch_norms=batch_norms)

    def _pairs(self) -> list[tuple[ChannelGroup, set[int]]]:
        return [(group.channels, set(gone)) for group, gone in zip(self._groups, self._gone, strict=True)]

    def _left_now(self) -> list[int]:
        return [group.size - len(gone) for group, gone in zip(self._groups, self._gone, strict=True)]

    def _cost(self, left: list[int]) -> int:
        return self._operations.of(left) if self._counts_flops else sum(left)

    def _check_attainable(self) -> None:
        most = self._selector.most()
        if self._counts_flops and self._target > most:
            raise ConfigError(
                f"{self._target} cannot be reached: at most {most:.3f} of this model's floating point operations can "
                "go (see the reasons in the statistics for what is left whole). Lower it, or lower multiple_of",
                path="params.pruning_flops_target",
            )

    def _importances(self) -> list[torch.Tensor]:
        """Returns the importance of the channels of each group; comparable between groups where that matters."""
        params = self.config.params
        return [
            channel_importance(
                [
                    (m.parameter, raw_parameter(self._active_model, m.parameter), m.dim, torch.from_numpy(m.channels))
                    for m in group.makers
                ],
                group.size,
                params.filter_importance,
                normalized=params.all_weights,
            )
            for group in self._groups
        ]

    def _left(self, level: float) -> list[int]:
        # What is gone for good cannot come back.
        left = self._selector.left(level, self._importances)
        return [min(number, group.size) for number, group in zip(left, self._groups, strict=True)]

    def _apply(self, level: float) -> None:
        self._select(self._left(level))
        self._requested = level

    def _apply_each(self, levels: Mapping[int, float]) -> None:
        left = self._left_now()
        for number, level in levels.items():
            group = self._groups[number]
            left[number] = min(group.left(level), group.size)
        self._select(left)

    def _select(self, left: list[int]) -> None:
        importances = self._importances()  # everything that can fail comes before the first mask is touched
        self._mask(
            [
                least_important(importance, group.size - number)
                for importance, group, number in zip(importances, self._groups, left, strict=True)
            ]
        )

    def _mask(self, gone: list[list[int]]) -> None:
        write_masks(self._active_model, self._masked(), gone, self.name)
        self._gone = gone

    def _resumed_plan(self, model: nn.Module, context: Context) -> Plan:
        plan = context.saved_plans[self.name]
        found = saved_plan(plan.details, self.name)
        self._groups, self._inputs, self._skipped = found.groups, found.inputs, dict(plan.skipped)
        self._operations, self._parameters = found.operations, found.parameters
        sizes = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
        for group in self._groups:
            for member in group.channels.members:
                shape = sizes.get(member.parameter, ())
                if len(shape) <= member.dim or shape[member.dim] != len(member.channels):
                    raise StateError(
                        f"compression_state does not fit this model: dimension {member.dim} of '{member.parameter}' "
                        f"has to have the size {np.size(member.channels)}. Build the model as it was before compression"
                    )
        path, config = context.section(self)
        for leaf, value, _ in config.given_leaves():
            context.ledger.record(f"{path}.{leaf}", value, "resumed: groups are those of the compression state")
        return plan
