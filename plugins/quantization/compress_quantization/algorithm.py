"""The algorithm `quantization`: fake-quantizes weights and activations, with learned scales."""

from __future__ import annotations

import contextlib
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from compress_core import (
    Algorithm,
    CompressionStage,
    ConfigError,
    Plan,
    QuantizationRangeInitArgs,
    Stage,
    UsageError,
    hookimpl,
)
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.data.calibration import CalibrationData
from compress_core.export import ExportTarget, GraphRewrite
from compress_core.pages import Block
from compress_core.saved import damaged
from compress_quantization.calibration import Calibrated, calibrate
from compress_quantization.config import QuantizationConfig, QuantizerGroup
from compress_quantization.config_checks import check_config, given_to_example_scripts, idle_in_precision
from compress_quantization.effects import applied_to
from compress_quantization.export import prepare, prepare_decomposed, rewrite, rewrite_program
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.footprints import with_quantizers
from compress_quantization.nncf_quantizers import taken_from_nncf
from compress_quantization.plan import PlannedQuantizer
from compress_quantization.planning import Planner
from compress_quantization.precision.chosen import ChosenPrecision, refuse_frozen
from compress_quantization.precision.report import PrecisionReport
from compress_quantization.profiles import load_profile
from compress_quantization.quantizers import add_quantizer, find_quantizer, make_quantizer, replace_by_native
from compress_quantization.ranges import collector_for
from compress_quantization.saved import SavedQuantization, saved_quantizers
from compress_quantization.seen import ranges_and_values
from compress_quantization.staging import StagedQuantization
from compress_quantization.statistics import QuantizationStatistics, QuantizerStatistics

logger = logging.getLogger(__name__)


class Quantization(Algorithm):
    """Fake-quantizes weights and activations: in training, they already have only values that integers can represent.

    Gradients pass straight through the rounding (straight-through estimator, Bengio et al., 2013, arXiv:1308.3432); the
    scales are learned with the gradients of LSQ (Esser et al., 2020, arXiv:1902.08153).
    """

    name = "quantization"
    Config = QuantizationConfig
    stage = Stage.PRECISION
    applies_lr_multiplier = True
    reads_later = ("params.activations_quant_start_epoch", "params.weights_quant_start_epoch")
    controller_api = (
        "all_quantizations",
        "weight_quantizers",
        "non_weight_quantizers",
        "init_range",
        "enable_weight_quantization",
        "disable_weight_quantization",
        "enable_activation_quantization",
        "disable_activation_quantization",
        "freeze_quantizers",
        "precision_report",
    )
    config: QuantizationConfig

    def __init__(self, config: QuantizationConfig) -> None:
        super().__init__(config)
        self._planned: list[PlannedQuantizer] = []
        self._skipped: dict[str, str] = {}
        self._potential: dict[str, int] = {}
        self._staging: StagedQuantization | None = None
        self._precision = ChosenPrecision()
        # Names of quantizers that stay off because no calibration sample reached them.
        self._off: list[str] = []
        # Whether activations have been calibrated on data; if so, later calibrations need data as well.
        self._calibrated_before = False

    # Hooks.

    @hookimpl
    def compress_configure(self, config: QuantizationConfig, context: Context) -> None:
        """Refuses settings that the device does not support, and values that contradict each other."""
        root = context.config.root
        check_config(config, root.target_device, strict=root.unused_values == "error")
        path, _ = context.section(self)
        if idle := given_to_example_scripts(config):
            names = ", ".join(name.removeprefix("params.") for name in idle)
            logger.warning(
                "%s.params: %s: only NNCF's example scripts read these; the values are not used", path, names
            )
        for leaf, value in idle.items():
            context.ledger.record(f"{path}.{leaf}", value, "no effect: for NNCF's example scripts")
        for leaf, (value, why) in idle_in_precision(config).items():
            logger.warning("%s.%s: has no effect: %s", path, leaf, why)
            context.ledger.record(f"{path}.{leaf}", value, f"no effect: {why}")

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Places the quantizers, from a trace of the model."""
        if context.resuming:
            return self._resumed_plan(model, context)
        path, _ = context.section(self)
        scopes = context.scope_filter(model, self)
        profile = load_profile(context.config.root.target_device)
        trace = context.trace(model, path)
        own = context.own_weights(model, self)
        planner = Planner(model, trace, self.config, profile, scopes, own)
        if self.config.validate_scopes:
            scopes.check(planner.scope_candidates)
        found = planner.plan()
        if not found.quantizers:
            raise ConfigError("finds nothing to quantize in this model; change the scopes, or remove this section")
        if (precision := self.config.unread().initializer.precision) is not None:
            refuse_frozen(model, precision, found.quantizers, found.choices)
        self._record(planner, scopes, path, context)
        self._precision.choices = found.choices
        self._planned, self._skipped, self._potential = found.quantizers, found.skipped, found.potential
        return Plan(
            tuple(quantizer.name for quantizer in self._planned),
            found.skipped,
            {"quantizers": [quantizer.to_dict() for quantizer in self._planned], "potential": found.potential},
        )

    @hookimpl
    def compress_commit(self, model: nn.Module) -> None:
        """Adds the quantizers, with provisional ranges."""
        for planned in self._planned:
            module = make_quantizer(planned.spec, planned.shape, is_gate=planned.is_gate)
            module.to(device=_device_of(model))
            add_quantizer(model, planned, module, self.stage, self.name)
        if self.config.params.staged:
            self._staging = StagedQuantization(self.config.params)
            self._apply_stage()

    @hookimpl
    def compress_calibrate(self, context: Context) -> None:
        """Sets the ranges, of weights from their values, of activations from data; chooses bits if the config asks."""
        self._calibrate(("weights", "activations"), context.batch_norm.as_it_will_be)
        path, precision = context.section(self)[0], self.config.initializer.precision
        if precision is not None and self._precision.choose(
            self.model, context, path, precision, self.all_quantizations, self._off
        ):
            self._planned = self._precision.planned(self._planned)
            # Activations have other ranges if the weights before them are rounded in another way.
            if context.has_data(QuantizationRangeInitArgs):
                self._calibrate(("weights", "activations"), context.batch_norm.as_it_will_be)

    @hookimpl
    def compress_effect(self, model: nn.Module, footprint: Footprint, at_end: bool) -> Footprint:
        """Gives the weights their bits, and one byte for each integer, as the exported files have."""
        on = [planned for planned, module in self._present if at_end or module.enabled]
        precision = self.config.unread().initializer.precision
        return with_quantizers(model, footprint, on, precision, self._precision.choices)

    @hookimpl
    def compress_epoch_step(self, clock: Clock, context: Context) -> None:
        """Turns groups of quantizers on in their epoch, with freshly measured ranges."""
        if self._staging is None:
            return
        begun = self._staging.epoch_step(clock)
        if begun:
            self._apply_stage()
            self._calibrate(begun)

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Returns the stage according to whether none, some or all quantizers are on."""
        enabled = [module.enabled for module in self.all_quantizations.values()]
        if all(enabled):
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if any(enabled) else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self) -> QuantizationStatistics:
        """Returns the present settings and ranges of the quantizers."""
        quantizers = tuple(self._described(planned, module) for planned, module in self._present)
        return QuantizationStatistics(quantizers, self._skipped, self._potential, self.precision_report)

    @hookimpl
    def compress_report(self, model: nn.Module, context: Context) -> list[Block]:
        """Returns histograms of what reaches the quantizers, and the share that they clip."""
        path, _ = context.section(self)
        data = context.report_data(path, QuantizationRangeInitArgs)
        return ranges_and_values(model, [pair for pair in self._present if pair[1].enabled], data)

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the state that is not in the `state_dict`: which quantizers are signed, on, and frozen."""
        modules = self.all_quantizations
        return {
            "signed": {name: module.signed for name, module in modules.items()},
            "enabled": {name: module.enabled for name, module in modules.items()},
            "frozen": {name: not any(p.requires_grad for p in module.parameters()) for name, module in modules.items()},
            "unreached": list(self._off),
            "calibrated": self._calibrated_before,
            "staging": None if self._staging is None else self._staging.get_state(),
            "precision": self._precision.get_state(),
        }

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state; the ranges come with the model's `state_dict`."""
        modules, path = self.all_quantizations, f"compression_state.algorithms.{self.name}.state"
        saved = SavedQuantization.checked(state, path, modules)
        if (self._staging is None) != (saved.staging is None):
            raise damaged(f"{path}.staging", "is there if and only if the config has staged quantization")
        self._planned = self._precision.load_state(
            saved.precision, self._planned, lambda: self.all_quantizations, f"{path}.precision"
        )
        for planned, module in self._present:
            name = planned.name
            fixed = planned.spec.signed if planned.spec.mode == "symmetric" else module.signed
            if fixed is not None and saved.signed[name] != fixed:
                raise damaged(f"{path}.signed.{name}", f"must be {fixed}, as in the plan")
            module.signed, module.enabled = saved.signed[name], saved.enabled[name]
            module.requires_grad_(not saved.frozen[name])
        self._off, self._calibrated_before = list(saved.unreached), saved.calibrated
        if self._staging is not None:
            self._staging.load_state(saved.staging or {}, f"{path}.staging")

    @hookimpl
    def compress_strip(self, model: nn.Module) -> None:
        """Replaces activation quantizers by torch's own fake-quantize operators; the core bakes the weights."""
        replace_by_native(model, [planned for planned in self._planned if planned.group == "activations"], self.name)

    @hookimpl
    def compress_export(self, model: nn.Module, target: ExportTarget) -> GraphRewrite:
        """Replaces quantizers by integer weights and the format's quantize and dequantize operators."""
        if target.format == "executorch":
            prepare_decomposed(model)
            return rewrite_program
        prepare(model, target.opset, is_centered=target.name == "tensorrt")
        return rewrite

    # What the controller offers.

    @property
    def all_quantizations(self) -> dict[str, FakeQuantize]:
        """All quantizers by name."""
        return {planned.name: module for planned, module in self._present}

    @property
    def weight_quantizers(self) -> dict[str, FakeQuantize]:
        """The quantizers of weights by name."""
        return {planned.name: module for planned, module in self._present if planned.group == "weights"}

    @property
    def non_weight_quantizers(self) -> dict[str, FakeQuantize]:
        """The quantizers of activations by name."""
        return {planned.name: module for planned, module in self._present if planned.group == "activations"}

    @property
    def precision_report(self) -> PrecisionReport | None:
        """What the method that chose the numbers of bits has measured; its `draw(path)` makes a picture."""
        return self._precision.report

    def init_range(self, group: QuantizerGroup | None = None) -> None:
        """Measures ranges again, on the current model.

        Args:
            group: `weights` or `activations`; by default both. Weights need no data; measure them again after you have
                written to them, as when an adapter is merged.

        Raises:
            DataError: There is no data.
            UsageError: There is no such group.
        """
        if group not in (None, "weights", "activations"):
            raise UsageError(f"init_range takes 'weights' or 'activations', got {reprlib.repr(group)}")
        self._calibrate(("weights", "activations") if group is None else (group,))

    def enable_weight_quantization(self) -> None:
        """Turns the quantizers of weights on."""
        _switch(self.weight_quantizers.values(), True)

    def disable_weight_quantization(self) -> None:
        """Turns the quantizers of weights off; layers then use unquantized weights."""
        _switch(self.weight_quantizers.values(), False)

    def enable_activation_quantization(self) -> None:
        """Turns the quantizers of activations on, except those that no calibration sample reached."""
        on = {name: module for name, module in self.non_weight_quantizers.items() if name not in self._off}
        _switch(on.values(), True)

    def disable_activation_quantization(self) -> None:
        """Turns the quantizers of activations off; activations then stay unquantized."""
        _switch(self.non_weight_quantizers.values(), False)

    def freeze_quantizers(self, freeze: bool = True) -> None:
        """Stops the learning of scales and ranges, or resumes it.

        Raises:
            UsageError: `freeze` is neither True nor False.
        """
        if not isinstance(freeze, bool):
            raise UsageError(f"freeze_quantizers takes True or False, got {freeze!r}")
        for module in self.all_quantizations.values():
            module.requires_grad_(not freeze)

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes scales and ranges of quantizers that have as many bits; see `Algorithm.take_nncf`."""
        return taken_from_nncf(tensors, self._present, self.model)

    # Implementation.

    @property
    def _present(self) -> list[tuple[PlannedQuantizer, FakeQuantize]]:
        """The quantizers that are in the model, each once: the user may replace or remove layers, or share one."""
        found: dict[int, tuple[PlannedQuantizer, FakeQuantize]] = {}
        for planned in self._planned:
            module = find_quantizer(self.model, planned, self.name)
            if module is not None:
                found.setdefault(id(module), (planned, module))
        return list(found.values())

    def _resumed_plan(self, model: nn.Module, context: Context) -> Plan:
        plan = context.saved_plans[self.name]
        self._planned, self._potential = saved_quantizers(plan, self.name, model)
        self._skipped = dict(plan.skipped)
        path, config = context.section(self)
        for leaf, value, _ in config.given_leaves():
            context.ledger.record(f"{path}.{leaf}", value, "resumed: quantizers are those of the compression state")
        return plan

    def _record(self, planner: Planner, scopes: Any, path: str, context: Context) -> None:
        named = planner.ignored_by_name
        for scope_path, entry in scopes.entries():
            if scope_path in named:
                context.ledger.record(scope_path, entry, "leaves out these quantizers", named[scope_path])
            else:
                context.ledger.record(scope_path, entry, "matches these modules", scopes.matches(entry))
        entries = {**planner.resolver.used, **planner.unified}
        for leaf, value, was_read in self.config.given_leaves():
            names = applied_to(leaf, entries)
            if names and was_read:
                effect = "one quantizer at these places" if leaf in planner.unified else "applies to these quantizers"
                context.ledger.record(f"{path}.{leaf}", value, effect, names)
            elif names == []:
                context.ledger.record(f"{path}.{leaf}", value, "matches nothing in this model")

    def _calibrated(self, planned: PlannedQuantizer, module: FakeQuantize) -> Calibrated:
        config = planned.initial_range.to_config()
        is_weight = planned.group == "weights"
        dims = [dim for dim, size in enumerate(planned.shape) if size > 1]
        statistics = collector_for(
            config,
            planned.spec,
            is_weight=is_weight,
            name=planned.parameter or planned.name,
            channel_dim=dims[0] if dims else None,
        )
        return Calibrated(planned, module, statistics, config.num_init_samples)

    def _calibrate(
        self, groups: Iterable[str], batch_norm: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        """Measures the ranges of groups of quantizers, or logs why they are not changed."""
        chosen = [self._calibrated(planned, module) for planned, module in self._present if planned.group in groups]
        context = self.context
        data = self._data([q for q in chosen if q.planned.group == "activations" and q.samples], context)
        strict = context.config.root.unused_values == "error"
        unreached = calibrate(self.model, chosen, data, batch_norm=batch_norm, strict=strict)
        seen = {quantizer.planned.name for quantizer in chosen if quantizer.samples and data is not None}
        self._off = sorted((set(self._off) - seen) | set(unreached))
        self._calibrated_before |= data is not None

    def _data(self, wanted: list[Calibrated], context: Context) -> CalibrationData | None:
        if not wanted:
            return None
        path, _ = context.section(self)
        if self._calibrated_before or self.config.initializer.range is not None:
            return context.calibration_data(f"{path}.initializer.range", QuantizationRangeInitArgs)
        if not context.has_data(QuantizationRangeInitArgs):
            logger.warning(
                "%s: there is no data to initialize the ranges of %d activation quantizers with; they are not usable "
                "until they are learned or loaded. Call register_default_init_args(config, loader)",
                path,
                len(wanted),
            )
            return None
        return context.calibration_data(f"{path}.initializer.range", QuantizationRangeInitArgs)

    def _apply_stage(self) -> None:
        assert self._staging is not None
        for planned, module in self._present:
            module.enabled = self._staging.is_on(planned.group) and planned.name not in self._off

    def _described(self, planned: PlannedQuantizer, module: FakeQuantize) -> QuantizerStatistics:
        low, high = module.range()
        return QuantizerStatistics(
            planned.name,
            planned.group,
            module.bits,
            planned.spec.mode,
            bool((low < 0).any()),
            planned.spec.per_channel,
            module.enabled,
            float(low.detach().min()),
            float(high.detach().max()),
            planned.parameter,
        )


def _switch(modules: Iterable[FakeQuantize], on: bool) -> None:
    for module in modules:
        module.enabled = on


def _device_of(model: nn.Module) -> Any:
    return next((parameter.device for parameter in model.parameters()), None)
