"""The algorithm `magnitude_sparsity`: masks weights, and recomputes the masks as the schedule says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import BaseModel, Field
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
    all_or_nothing,
    hookimpl,
)
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.data.calibration import CalibrationData
from compress_core.saved import Whole, damaged, parsed
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
from compress_magnitude_sparsity.schedules import Schedule, make_schedule
from compress_magnitude_sparsity.statistics import LayerSparsity, MagnitudeSparsityStatistics

_RANKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SavedSparsity(BaseModel):
    """The state that `compress_state` saves."""

    level: float = Field(ge=0, lt=1)
    frozen: bool
    schedule: dict[str, Any]
    time: tuple[Whole, Whole] | None = None


class MagnitudeSparsity(LevelAlgorithm):
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

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._schedule: Schedule | None = None
        self._targets: tuple[str, ...] = ()
        self._skipped: Mapping[str, str] = {}
        self._requested = 0.0
        # Epoch and finished optimizer steps when the schedule's masks were computed; None if they are others.
        self._time: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Schedules are functions, which pickle cannot store; they are made again from the config.
        return {**self.__dict__, "_schedule": None if self._schedule is None else self._schedule.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_schedule"] is not None:
            self._schedule = make_schedule(self.config)
            self._schedule.load_state(state["_schedule"])

    # Lifecycle.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        _check(self.config.unread())
        # At this point every value that takes effect has been read.
        self._schedule = make_schedule(self.config)
        _ = (self._is_global, self.config.sparsity_init)
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
        plan = context.plan_weights(model, self)
        for name in plan.targets:
            dtype = raw_parameter(model, name).dtype
            if dtype not in _RANKED_DTYPES:
                raise ModelError(
                    f"the weight '{name}' has the dtype {dtype}; magnitude sparsity ranks float16, bfloat16, float32 "
                    "and float64: convert the model, or name the layer in ignored_scopes"
                )
        if needs_data(self._importance) and not context.resuming:
            self._data(context)
        return plan

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan) -> None:
        """Adds the masks, at the initial level."""
        self._targets, self._skipped = plan.targets, plan.skipped
        importance = self._importance
        found = None
        if needs_data(importance) and self.context.resuming:
            self._record_settings_of_measuring()
        elif needs_data(importance):
            found = self._measured(model, importance)
        for name in self._targets:
            add_mask(model, name, self.name)
        if found is not None and needs_data(importance) and importance.returns == "factors":
            for name in self._present:
                self._mask(name).factor = compact(found[name]) if name in found else None
            found = None
        self._ranking(self._present).set_level(self.config.sparsity_init, together=self._is_global, chosen=found)
        self._requested, self._time = self.config.sparsity_init, (0, 0)

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets the level of the epoch that begins."""
        if clock.epoch >= self._active_schedule.freeze_epoch:
            self._frozen = True
        level = self._active_schedule.at_epoch(clock, self.sparsity_level)
        if level is not None and not self._frozen:
            self._follow_schedule(level, (clock.epoch, clock.step + 1))

    @hookimpl
    def compress_step(self, clock: Clock) -> None:
        """Sets the level of the optimizer step that begins, with `update_per_optimizer_step`."""
        level = None if self._frozen else self._active_schedule.at_step(clock)
        if level is not None:
            self._follow_schedule(level, (clock.epoch, clock.step))

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Compares the masked share with the target."""
        zeros, _ = self._counts()
        if zeros >= self._attainable(self.target_level):
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if zeros else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> MagnitudeSparsityStatistics:
        """Measures the masks."""
        layers = []
        for name in self._present:
            mask, weight = self._mask(name).mask, raw_parameter(model, name)
            layers.append(LayerSparsity(name, tuple(weight.shape), weight.numel(), weight.numel() - _kept(mask)))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return MagnitudeSparsityStatistics(
            layers=tuple(layers),
            model_parameters=parameters,
            model_weights=sum(layer.weights for layer in layers) + sum(_size(model, name) for name in self._skipped),
            skipped=self._skipped,
            requested_level=self._requested,
            target_level=self.target_level,
            frozen=self._frozen,
        )

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the level, whether masks are frozen, and the schedule; masks are in the model's `state_dict`."""
        return {
            "level": self._requested,
            "frozen": self._frozen,
            "schedule": self._active_schedule.get_state(),
            "time": self._time,
        }

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state; masks come from the present weights until a `state_dict` with saved masks is loaded."""
        path = f"compression_state.algorithms.{self.name}.state"
        saved = parsed(SavedSparsity, state, path)
        expected = sorted(self._active_schedule.get_state())
        if sorted(saved.schedule) != expected:
            raise damaged(f"{path}.schedule", f"must have the keys {expected}, got {sorted(saved.schedule)[:5]}")
        try:
            self._active_schedule.load_state(saved.schedule)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise damaged(f"{path}.schedule", str(error)) from error
        self._ranking(self._present).set_level(saved.level, together=self._is_global)
        self._requested, self._time = saved.level, saved.time
        mark_awaiting(self._mask(name) for name in self._present)
        self._frozen = saved.frozen

    # What the controller offers.

    @property
    def target_level(self) -> float:
        """Level at the end of the schedule."""
        return self._active_schedule.target

    @property
    def sparsity_level(self) -> float:
        """Measured share of the weights of sparsified layers that is masked."""
        zeros, total = self._counts()
        return zeros / total if total else 0.0

    current_sparsity_level = sparsity_level

    def level(self) -> float:
        """Returns the sparsity level."""
        return self.sparsity_level

    def set_level(self, level: float) -> None:
        """Calls `set_sparsity_level`."""
        self.set_sparsity_level(level)

    @property
    def sparsified_module_info(self) -> list[str]:
        """Dotted names of the weights that have a mask."""
        return list(self._present)

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
        names = self._present if module_info is None else self._targets_below(module_info)
        with self.context.batch_norm.adapted(run_batchnorm_adaptation):
            self._ranking(names).set_level(level, together=module_info is not None or self._is_global)
        # The next level of the schedule holds for all, and is computed again.
        self._time = None
        if module_info is None:
            self._requested = level

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes the masks `_binary_mask` of magnitude, const and RB sparsity; see `Algorithm.take_nncf`."""
        present = set(self._present)
        found = {t.key: t for t in tensors if t.name == "_binary_mask" and f"{t.module}.weight" in present}
        taken: dict[str, tuple[str, torch.Tensor] | None] = {}
        for key, tensor in found.items():
            name = f"{tensor.module}.weight"
            if tensor.value.shape == self._mask(name).mask.shape:
                entry = f"{tensor.module}.weight_transforms.weight.{self.name}.mask"
                taken[key] = (entry, tensor.value != 0)
        if taken:
            self._requested = 1 - sum(_kept(found[key].value) for key in taken) / sum(
                found[k].value.numel() for k in taken
            )
            self._time = None
        return taken

    # Implementation.

    @property
    def _active_schedule(self) -> Schedule:
        assert self._schedule is not None, "the algorithm has not been committed"
        return self._schedule

    @property
    def _is_global(self) -> bool:
        return self.config.params.sparsity_level_setting_mode == "global"

    @property
    def _importance(self) -> Importance:
        return importance_named(self.config.params.weight_importance)

    def _ranking(self, names: tuple[str, ...]) -> Ranking:
        return Ranking(self.model, {name: self._mask(name) for name in names}, self._importance)

    def _follow_schedule(self, level: float, time: tuple[int, int]) -> None:
        """Computes the masks for a level, unless they are those of this level and nothing was trained since."""
        masks = [self._mask(name) for name in self._present]
        if (level, time) == (self._requested, self._time) and not any(m.is_outdated for m in masks):
            return
        self._set_masks(level, time)

    @all_or_nothing
    def _set_masks(self, level: float, time: tuple[int, int]) -> None:
        self._ranking(self._present).set_level(level, together=self._is_global)
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
        sizes = [raw_parameter(self.model, name).numel() for name in self._present]
        if self._is_global:
            return min(round(level * sum(sizes)), sum(max(size - 1, 0) for size in sizes))
        return sum(min(round(level * size), max(size - 1, 0)) for size in sizes)

    def _counts(self) -> tuple[int, int]:
        masks = [self._mask(name).mask for name in self._present]
        total = sum(mask.numel() for mask in masks)
        return total - sum(_kept(mask) for mask in masks), total

    @property
    def _present(self) -> tuple[str, ...]:
        """The targets that still have a mask of their own: the user may replace or remove layers, or share one."""
        masks = {name: get_weight_transform(self.model, name, self.name) for name in self._targets}
        first = {id(mask): name for name, mask in reversed(masks.items())}
        return tuple(name for name, mask in masks.items() if mask is not None and first[id(mask)] == name)

    def _mask(self, name: str) -> RatedMask:
        return cast("RatedMask", get_weight_transform(self.model, name, self.name))

    def _targets_below(self, module_info: str) -> tuple[str, ...]:
        names = tuple(n for n in self._present if n == module_info or n.rpartition(".")[0] == module_info)
        if not names:
            raise UsageError(
                f"'{module_info}' is not sparsified; choose one of {', '.join(self._present[:5])}"
                + (", ..." if len(self._present) > 5 else "")
            )
        return names


def _check(config: MagnitudeSparsityConfig) -> None:
    params = config.params
    if params.schedule == "multistep":
        steps, levels = params.multistep_steps, params.multistep_sparsity_levels
        if len(levels) != len(steps) + 1:
            missing = {"multistep_steps", "multistep_sparsity_levels"} - params.model_fields_set
            default = f" ({' and '.join(sorted(missing))} not given: the default)" if missing else ""
            raise ConfigError(
                f"has {len(levels)} levels for {len(steps)} steps {steps}{default}; there must be one level more than "
                "steps",
                path="params.multistep_sparsity_levels",
            )
        if len(set(steps)) < len(steps):
            raise ConfigError(
                f"names an epoch twice: {steps}; one level would never apply", path="params.multistep_steps"
            )
        if levels[-1] < config.sparsity_init:
            raise ConfigError(
                f"ends at {levels[-1]}, below sparsity_init {config.sparsity_init}; raise it or lower the "
                "initial level",
                path="params.multistep_sparsity_levels",
            )
    elif params.sparsity_target < config.sparsity_init:
        raise ConfigError(
            f"sparsity_target {params.sparsity_target} is below sparsity_init {config.sparsity_init}; "
            "raise the target or lower the initial level",
            path="params.sparsity_target",
        )


def _kept(mask: torch.Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _size(model: nn.Module, name: str) -> int:
    """Returns the number of elements of a weight, which may be computed by a parametrization."""
    module, _, attribute = name.rpartition(".")
    weight: torch.Tensor = getattr(model.get_submodule(module), attribute)
    return weight.numel()
