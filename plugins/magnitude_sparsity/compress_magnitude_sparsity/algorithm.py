"""The algorithm `magnitude_sparsity`: masks weights, and recomputes the masks as the schedule says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from compress_core import (
    AlgorithmConfig,
    CompressionStage,
    ConfigError,
    Plan,
    Stage,
    all_or_nothing,
    hookimpl,
)
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.contract.scheduled_sparsity import ScheduledSparsity
from compress_core.data.calibration import CalibrationData
from compress_core.transforms import get_weight_transform, raw_parameter
from compress_core.transforms.checkpoints import mark_awaiting
from compress_magnitude_sparsity.config import MagnitudeSparsityConfig
from compress_magnitude_sparsity.importance import (
    DataImportance,
    Importance,
    ImportanceRequest,
    compact,
    importance_named,
    measured,
    needs_data,
)
from compress_magnitude_sparsity.ranking import Ranking, supports
from compress_magnitude_sparsity.rated_mask import RatedMask, add_mask
from compress_magnitude_sparsity.statistics import MagnitudeSparsityStatistics


class MagnitudeSparsity(ScheduledSparsity):
    """Unstructured sparsity by magnitude (Han et al. 2015; schedules after Zhu & Gupta 2017).

    The masks are computed from the stored weights whenever the schedule sets a level, so a weight that was masked can
    come back until the masks are frozen. With an importance that needs data, they are computed at the creation, and
    later levels add zeros or take some away. Levels are exact: of n weights, round(level * n) are zero.
    """

    name = "magnitude_sparsity"
    Config: ClassVar[type[AlgorithmConfig]] = MagnitudeSparsityConfig
    stage = Stage.SPARSITY
    controller_api = (
        "set_sparsity_level",
        "freeze",
        "frozen",
        "sparsity_level",
        "current_sparsity_level",
        "target_level",
        "sparsified_module_info",
    )

    config: MagnitudeSparsityConfig

    # Lifecycle.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        # At this point every value that takes effect has been read.
        self.configure_schedule(context)
        importance = self._importance
        if needs_data(importance):
            self._check_measuring(importance)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans to mask every weight that the scopes allow.

        Raises:
            ModelError: A weight has a dtype that cannot be ranked.
        """
        plan = self.plan_masks(model, context)
        if needs_data(self._importance) and not (context.resuming or context.planning):
            self._data(context)
        return plan

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan) -> None:
        """Adds the masks, at the initial level."""
        self.remember(plan)
        importance = self._importance
        found = None
        if needs_data(importance) and self.context.resuming:
            self._record_settings_of_measuring()
        elif needs_data(importance) and not self.context.planning:
            found = self._measured(model, importance)
        for name in self._targets:
            add_mask(model, name, self.name)
        if found is not None and needs_data(importance) and importance.returns == "factors":
            for name in self.present:
                self._mask(name).factor = compact(found[name]) if name in found else None
            found = None
        # What a plan cannot measure stays without zeros; `compress_effect` says how many there will be.
        known = not (self.context.planning and needs_data(importance))
        level = self.config.sparsity_init if known else 0.0
        self._ranking(self.present).set_level(level, together=self.is_global, chosen=found)
        self._requested, self._time = self.config.sparsity_init, (0, 0)

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Compares the masked share with the target."""
        zeros, _ = self.counts()
        if zeros >= self._attainable(self.target_level):
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if zeros else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> MagnitudeSparsityStatistics:
        """Measures the masks."""
        return MagnitudeSparsityStatistics(**self.measured(model), **self.progress_figures())

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts the zeros; how many there are never depends on data, but which weights they are may."""
        name = self.config.unread().params.weight_importance
        if not needs_data(importance_named(name)):
            return super().compress_effect(footprint, at_end)
        if at_end:
            footprint = self.with_last_level(footprint)
        elif self.context.planning:
            footprint = self.with_level(footprint, self._requested)
        else:
            footprint = self.with_masks(footprint)
        return footprint.noted(f"which weights become zero is decided from data when the model is created: '{name}'")

    def with_level(self, footprint: Footprint, level: float) -> Footprint:
        """Returns a footprint in which a level is reached by the weights as they are now."""
        importance = importance_named(self.config.unread().params.weight_importance)
        if needs_data(importance):
            return super().with_level(footprint, level)
        zeros = self._ranking(self.present).zeros_at(level, together=self.is_global)
        found = footprint.with_levels({name: n / max(self._mask(name).mask.numel(), 1) for name, n in zeros.items()})
        if not (level and self.is_global):
            return found
        return found.noted("zeros of single layers are those by the weights as they are now, and training moves those")

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state; masks come from the present weights until a `state_dict` with saved masks is loaded."""
        saved = self.loaded_sparsity(state)
        self._ranking(self.present).set_level(saved.level, together=self.is_global)
        self._requested, self._time = saved.level, saved.time
        mark_awaiting(self._mask(name) for name in self.present)
        self._frozen = saved.frozen

    # What the controller offers.

    def set_sparsity_level(
        self, level: float, module_info: str | None = None, run_batchnorm_adaptation: bool = False
    ) -> None:
        """Computes the masks for a level.

        Args:
            level: Share of weights to mask, 0 <= level < 1.
            module_info: Dotted name of a single layer or weight to change; by default all of them.
            run_batchnorm_adaptation: Whether to adapt batch norm to the change.

        Raises:
            UsageError: The level is out of range, the layer is not sparsified, or the masks are frozen.
        """
        self._check_level("sparsity level", level)
        names = self.present if module_info is None else self.targets_below(module_info)
        with self.context.batch_norm.adapted(run_batchnorm_adaptation):
            self._ranking(names).set_level(level, together=module_info is not None or self.is_global)
        # The next level of the schedule holds for all, and is computed again.
        self._time = None
        if module_info is None:
            self._requested = level

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes the masks `_binary_mask` of magnitude, const and RB sparsity; see `Algorithm.take_nncf`."""
        taken = super().take_nncf(tensors)
        masks = [entry[1] for entry in taken.values() if entry is not None]
        if masks:
            kept = sum(int(torch.count_nonzero(mask)) for mask in masks)
            self._requested = 1 - kept / sum(mask.numel() for mask in masks)
            self._time = None
        return taken

    # Implementation.

    @property
    def _importance(self) -> Importance:
        return importance_named(self.config.params.weight_importance)

    def _ranking(self, names: tuple[str, ...]) -> Ranking:
        return Ranking(self.model, {name: self._mask(name) for name in names}, self._importance)

    def follow_schedule(self, level: float, time: tuple[int, int]) -> None:
        """Computes the masks for a level, unless they are those of this level and nothing was trained since."""
        masks = [self._mask(name) for name in self.present]
        if (level, time) == (self._requested, self._time) and not any(m.is_outdated for m in masks):
            return
        self._set_masks(level, time)

    @all_or_nothing
    def _set_masks(self, level: float, time: tuple[int, int]) -> None:
        self._ranking(self.present).set_level(level, together=self.is_global)
        self._requested, self._time = level, time

    def _check_measuring(self, importance: DataImportance) -> None:
        name, initial = self.config.params.weight_importance, self.config.sparsity_init
        if importance.uses_steps:
            _ = self.config.params.importance_steps
        if importance.returns == "masks" and not initial:
            raise ConfigError(
                f"is 0, and '{name}' chooses once, at the creation, what goes at this level; raise it, or choose "
                "another params.weight_importance",
                path="sparsity_init",
            )

    def _data(self, context: Context) -> CalibrationData:
        path, _ = context.section(self)
        return context.calibration_data(f"{path}.params.weight_importance")

    def _measured(self, model: nn.Module, importance: DataImportance) -> dict[str, torch.Tensor]:
        request = ImportanceRequest(
            model=model,
            weights=self._targets,
            supports=supports(model, self._targets),
            level=self.config.sparsity_init,
            mode=self.config.params.sparsity_level_setting_mode,
            steps=self.config.params.importance_steps if importance.uses_steps else 1,
            data=self._data(self.context),
            config=self.config,
        )
        return measured(importance, request)

    def _record_settings_of_measuring(self) -> None:
        """Notes what the importance has read at the creation: resuming does not measure again."""
        path, config = self.context.section(self)
        for leaf, value, was_read in config.given_leaves():
            if leaf.startswith("initializer.") and not was_read:
                self.context.ledger.record(
                    f"{path}.{leaf}", value, "resumed: what stays is that of the compression state"
                )

    def _attainable(self, level: float) -> int:
        """Returns the number of zeros at a level; at least one weight of each layer stays."""
        sizes = [raw_parameter(self.model, name).numel() for name in self.present]
        if self.is_global:
            return min(round(level * sum(sizes)), sum(max(size - 1, 0) for size in sizes))
        return sum(min(round(level * size), max(size - 1, 0)) for size in sizes)

    def kept(self, name: str) -> torch.Tensor:
        """Returns the mask of a weight."""
        return self._mask(name).mask

    def _mask(self, name: str) -> RatedMask:
        return cast("RatedMask", get_weight_transform(self.model, name, self.name))
