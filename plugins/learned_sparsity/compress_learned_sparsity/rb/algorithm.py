"""The algorithm `rb_sparsity`: learned gates, and a loss that asks for a level."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from compress_core import AlgorithmConfig, CompressionStage, Plan, Stage, all_or_nothing, hookimpl
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.contract.scheduled_sparsity import ScheduledSparsity
from compress_core.contract.sparsity_statistics import ScheduledSparsityStatistics
from compress_core.transforms import add_weight_transform, get_weight_transform, raw_parameter
from compress_core.transforms.checkpoints import mark_awaiting
from compress_core.transforms.interrupts import interrupts_held
from compress_learned_sparsity.rb.config import RBSparsityConfig
from compress_learned_sparsity.rb.gates import StochasticGate
from compress_learned_sparsity.rb.loss import level_loss

logger = logging.getLogger(__name__)

# Training keeps the level near what the loss asks for, not on it. So much may be missing of a target that counts as
# reached; the adaptive schedule has the same tolerance by default.
_TOLERANCE = 0.03


@dataclass(frozen=True)
class RBSparsityStatistics(ScheduledSparsityStatistics):
    """Measured levels; `requested_level` is what the loss asks for.

    Attributes:
        mean_sparse_prob: Mean probability of a gate to be closed.
    """

    title: ClassVar[str] = "Regularization-based sparsity"
    figures: ClassVar[Mapping[str, str]] = {
        **ScheduledSparsityStatistics.figures,
        "requested_level": "level that the loss asks for",
        "mean_sparse_prob": "mean probability of a closed gate",
    }

    mean_sparse_prob: float


class RBSparsity(ScheduledSparsity):
    """Regularization-based sparsity (NNCF's `rb_sparsity`; after Louizos et al. 2018 and Srinivas et al. 2017).

    Each weight has a gate with a learned probability. The loss asks for a share of closed gates; which ones close is
    learned with the task. So a level is reached by training, and not when it is set.
    """

    name = "rb_sparsity"
    Config: ClassVar[type[AlgorithmConfig]] = RBSparsityConfig
    stage = Stage.SPARSITY
    applies_lr_multiplier = True
    nncf_entries: ClassVar[Mapping[str, str | None]] = {"_mask": "scores", "_binary_mask": None}
    controller_api = (
        "set_sparsity_level",
        "freeze",
        "frozen",
        "sparsity_level",
        "current_sparsity_level",
        "requested_level",
        "target_level",
        "sparsified_module_info",
    )
    config: RBSparsityConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        # Whether the level was set as a rate: it holds, and gates are trained to reach it, so the schedule has ended.
        self._held = False
        # Losses since the last optimizer step began, to notice loops that do not tell the scheduler of steps.
        self._losses = 0
        self._warned = False

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        self.configure_schedule(context)
        _ = (self.config.params.seed, self.config.compression_lr_multiplier)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans gates for every weight that the scopes allow and that is trained."""
        return self.plan_masks(model, context, frozen=False)

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan, context: Context) -> None:
        """Adds the gates, nearly all of them open."""
        self.remember(plan)
        for name in plan.targets:
            if get_weight_transform(model, name, self.name) is None:  # a tied weight has it already
                weight = raw_parameter(model, name)
                gate = StochasticGate(weight, name=name, seed=self.config.params.seed)
                add_weight_transform(model, name, gate, stage=Stage.SPARSITY, key=self.name)
        self._requested, self._time = self.config.sparsity_init, (0, 0)

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets what the loss asks for in the epoch that begins, and draws noise."""
        if not self._held:
            super().compress_epoch_step(clock)
        if self._losses > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "%s: controller.scheduler.step() was not called in the last epoch, so the gates had the same noise in "
                "all of its steps; call it before each optimizer step",
                self.name,
            )
        self._losses = 0
        self._draw(clock.step + 1)

    @hookimpl
    def compress_step(self, clock: Clock) -> None:
        """Draws the noise of the optimizer step that begins."""
        if not self._held:
            super().compress_step(clock)
        self._losses = 0
        self._draw(clock.step)

    @hookimpl
    def compress_loss(self) -> torch.Tensor:
        """Returns how far the share of open gates is from what is asked for; zero when they are frozen."""
        gates = self._gates()
        if not gates or self._frozen:
            device = gates[0].scores.device if gates else None
            return torch.zeros((), device=device)
        self._losses += 1
        return level_loss(gates, self._requested, together=self.is_global)

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Compares the closed share with the target, of which 0.03 (at most half) may be missing."""
        zeros, total = self.counts()
        target = self.target_level
        if zeros >= max(target - _TOLERANCE, target / 2) * total:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if zeros else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> RBSparsityStatistics:
        """Counts the closed gates."""
        gates = self._gates()
        total = sum(gate.scores.numel() for gate in gates)
        with torch.no_grad():
            is_open = sum(float(gate.probabilities().double().sum()) for gate in gates)
        return RBSparsityStatistics(
            **self.measured(model), **self.progress_figures(), mean_sparse_prob=1 - is_open / total if total else 0.0
        )

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts the closed gates; the end is what the loss asks for."""
        found = super().compress_effect(footprint, at_end)
        words = "the loss asks for the level at the end; training decides how near it comes"
        return found.noted(words) if at_end else found

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the level, whether it was set as a rate, whether gates are frozen, and the schedule."""
        return {**super().compress_state(), "held": self._held}

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state; the `state_dict` brings scores, masks and the number of the step."""
        saved = self.loaded_sparsity(state)
        self._held = saved.held
        self._requested, self._time, self._frozen = saved.level, saved.time, saved.frozen
        for gate in self._gates():
            gate.frozen = saved.frozen
        mark_awaiting(self._gates())

    # What the controller offers.

    @property
    def requested_level(self) -> float:
        """The level that the loss asks for."""
        return self._requested

    def set_sparsity_level(self, level: float) -> None:
        """Sets the level that the loss asks for; the gates reach it by training.

        Args:
            level: Share of weights that is to be zero, 0 <= level < 1.

        Raises:
            UsageError: The level is out of range, or the gates are frozen.
        """
        self._check_level("sparsity level", level)
        self._requested, self._time = float(level), None

    def freeze(self, freeze: bool = True) -> None:
        """Keeps the gates that are open now, without noise and without loss, or lets them change again.

        The scores stay in the graph with a gradient of zero, which DistributedDataParallel needs; whatever an optimizer
        with momentum or weight decay does to them changes no gate.

        Raises:
            UsageError: `freeze` is neither True nor False.
        """
        super().freeze(freeze)
        self._held = False
        for gate in self._gates():
            gate.freeze(freeze)

    def follow_schedule(self, level: float, time: tuple[int, int]) -> None:
        """Sets the level that the loss asks for."""
        self._requested, self._time = level, time

    @all_or_nothing
    def _set_rate(self, rate: float) -> None:
        # Unlike a mask that is computed, a gate has to be trained to reach the level, so it stays unfrozen. The
        # schedule ends, which would set another level in the next epoch, or freeze the gates before they are there.
        self.freeze(False)
        self.set_sparsity_level(rate)
        self._held = True

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes the scores; the noise begins anew, because NNCF's is not that of a step. See `Algorithm.take_nncf`."""
        taken = super().take_nncf(tensors)
        present = set(self.present)
        for tensor in tensors:
            if tensor.name == "uniform" and f"{tensor.module}.weight" in present:
                name = f"{tensor.module}.weight_transforms.weight.{self.name}.moment"
                taken[tensor.key] = (name, torch.zeros((), dtype=torch.int64))
        return taken

    def kept(self, name: str) -> torch.Tensor:
        """Returns which gates of a weight are open without noise."""
        return self._gate(name).is_open()

    def _gate(self, name: str) -> StochasticGate:
        return cast("StochasticGate", get_weight_transform(self.model, name, self.name))

    def _gates(self) -> list[StochasticGate]:
        return [self._gate(name) for name in self.present]

    def _draw(self, moment: int) -> None:
        with interrupts_held():  # all gates have the noise of the same step
            for gate in self._gates():
                gate.draw(moment)
