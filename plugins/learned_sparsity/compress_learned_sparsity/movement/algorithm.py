"""The algorithm `movement_sparsity`: scores learned from where weights move, and channels that go with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from compress_core import (
    AlgorithmConfig,
    CompressionError,
    CompressionStage,
    ConfigError,
    DataError,
    Plan,
    Stage,
    UsageError,
    hookimpl,
)
from compress_core.channels import Role, Shrinkage, lost_channels, renumbered, smaller_group
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.masked_weights import MaskingAlgorithm
from compress_core.contract.trained_weights import trained_weights
from compress_core.transforms import add_weight_transform, bypass_transforms, get_weight_transform, raw_parameter
from compress_core.transforms.checkpoints import mark_awaiting
from compress_core.transforms.interrupts import interrupts_held
from compress_core.transforms.layers import WeightTensor
from compress_learned_sparsity.movement.channels import (
    Structure,
    dead_channels,
    find_structure,
    remove_channels,
    structured_masks,
)
from compress_learned_sparsity.movement.config import MovementSparsityConfig
from compress_learned_sparsity.movement.saved import checked_state, details, restored
from compress_learned_sparsity.movement.scores import MovementMask, lowest_share
from compress_learned_sparsity.movement.statistics import ChannelStatistics, MovementSparsityStatistics
from compress_learned_sparsity.movement.structure import LINEAR, Linear, linear_layers
from compress_learned_sparsity.movement.warmup import WarmUp

logger = logging.getLogger(__name__)

# If no initial threshold is given, this share of the scores is below it.
_FIRST_SHARE = 0.001


class MovementSparsity(MaskingAlgorithm):
    """Movement sparsity of linear layers (Sanh et al. 2020; blocks and structure after Lagunas et al. 2021, and NNCF).

    During the warm-up a threshold and a loss that lowers all scores rise; what does not exceed the threshold is masked.
    At its end the masks are frozen, and channels and heads that are masked in all layers that make and read them are
    removed at `strip`.
    """

    name = "movement_sparsity"
    Config: ClassVar[type[AlgorithmConfig]] = MovementSparsityConfig
    stage = Stage.SPARSITY
    applies_lr_multiplier = True
    nncf_entries: ClassVar[Mapping[str, str | None]] = {}  # its scores have other names and shapes in each version
    controller_api = (
        "freeze",
        "frozen",
        "sparsity_level",
        "current_sparsity_level",
        "importance_threshold",
        "importance_regularization_factor",
        "sparsified_module_info",
        "shrink_plan",
    )
    config: MovementSparsityConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._warmup: WarmUp | None = None
        self._layers: list[Linear] = []
        self._structure = Structure()
        self._gone: list[set[int]] = []
        self._initial: float | None = None
        self._factor = 0.0
        self._frozen = self._over = False
        self._stripped = Shrinkage()

    # Hooks.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        self.config.unread().params.check()
        self._warmup = warmup = WarmUp.of(self.config.params)
        self._initial = warmup.initial
        if warmup.initial is not None and warmup.initial >= warmup.final:
            path, _ = context.section(self)
            logger.warning(
                "%s.params: init_importance_threshold %g is not below final_importance_threshold %g, so the threshold "
                "does not rise",
                path,
                warmup.initial,
                warmup.final,
            )
        _ = (self.config.params.enable_structured_masking, self.config.compression_lr_multiplier)
        for entry in self.config.sparse_structure_by_scopes:
            _ = (entry.mode, entry.sparse_factors, entry.axis, entry.target_scopes)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans scores for the linear layers, and finds the channels that may be removed."""
        if context.resuming:
            return self._resumed_plan(model, context)
        path, section = context.section(self)
        structured = self.config.params.enable_structured_masking
        found, skipped = context.weight_targets(model, self, traces=structured)
        linear = []
        for tensor in found:
            if _is_linear(tensor):
                linear.append(tensor)
            else:
                skipped[tensor.name] = "belongs to no linear layer"
        tensors = trained_weights(linear, skipped, self, context)
        if not tensors:
            raise ConfigError("finds no linear layer that is trained; change the scopes, or remove this section")
        self._layers = linear_layers(
            model,
            tensors,
            self.config.sparse_structure_by_scopes,
            f"{path}.sparse_structure_by_scopes",
            context.ledger,
            validate=section.validate_scopes,
        )
        if structured:
            self._structure = self._found_structure(model, context, path)
        return Plan(_names(self._layers), skipped, details(self._layers, self._structure))

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan, context: Context) -> None:
        """Adds scores of 0 and masks of ones."""
        self.remember(plan)
        for layer in self._layers:
            self._add(model, layer.weight, layer.block)
            if layer.bias:
                self._add(model, layer.bias, layer.bias_block)

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets threshold and masks of the epoch that begins, or ends the warm-up."""
        if clock.epoch >= self.warmup.end and not self._over:
            self._end()
        self._follow(clock)

    @hookimpl
    def compress_step(self, clock: Clock) -> None:
        """Sets threshold and masks of the optimizer step that begins."""
        self._follow(clock)

    @hookimpl
    def compress_loss(self) -> torch.Tensor:
        """Returns half of the mean score of the layers, as probabilities times elements, with the present factor."""
        learned = [layer for layer in self._layers if self._has_scores(layer.weight)]
        if self._frozen or not self._factor or not learned:
            device = next((self._mask(name).mask.device for name in self.present), None)
            return torch.zeros((), device=device)
        device = self._mask(learned[0].weight).mask.device
        losses = []
        for layer in learned:
            names = [name for name in (layer.weight, layer.bias) if name and self._has_scores(name)]
            losses.append(torch.stack([self._mask(name).regularization().to(device) for name in names]).sum())
        return self._factor * 0.5 * torch.stack(losses).mean()

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Full when the warm-up is over and has masked something."""
        zeros, _ = self.counts()
        if not zeros:
            return CompressionStage.UNCOMPRESSED
        return CompressionStage.FULLY_COMPRESSED if self._over else CompressionStage.PARTIALLY_COMPRESSED

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> MovementSparsityStatistics:
        """Counts the masked weights, and the channels that go."""
        gone = self._gone or [set() for _ in self._structure.groups]
        channels = tuple(
            ChannelStatistics(tuple(m.parameter for m in group.members if m.role == Role.MAKES), group.size, len(lost))
            for group, lost in zip(self._structure.groups, gone, strict=True)
        )
        threshold = self.importance_threshold
        return MovementSparsityStatistics(
            **self.measured(model),
            importance_threshold=threshold if math.isfinite(threshold) else None,
            importance_regularization_factor=self._factor,
            frozen=self._frozen,
            channels=channels,
            whole=self._structure.whole,
        )

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the progress of the warm-up; scores and masks are in the model's `state_dict`."""
        return {
            "frozen": self._frozen,
            "over": self._over,
            "initial": self._initial,
            "factor": self._factor,
            "gone": [sorted(lost) for lost in self._gone],
        }

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the progress; the `state_dict` brings scores and masks."""
        saved = checked_state(state, self.name, self._structure)
        self._initial, self._factor = saved.initial, saved.factor
        self._over, self._gone = saved.over, [set(lost) for lost in saved.gone]
        self._set_frozen(saved.frozen)
        mark_awaiting(self._mask(name) for name in self.present)

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts what is masked now; at the end training will have decided."""
        if not at_end or self._over:
            return self.with_masks(footprint)
        footprint = footprint.remarked(dict.fromkeys(self.present, "masked as training decides"))
        if not self._structure.groups:
            return footprint.left_open("training decides which weights are masked", ("nonzero",))
        return footprint.left_open("training decides which weights are masked, and which channels and heads go")

    @hookimpl
    def compress_shrunk(self, model: nn.Module, shrinkage: Shrinkage, context: Context) -> None:
        """Brings the groups up to date after another algorithm has removed channels for good."""
        if model is not self.model or context.removed_so_far:
            return
        lost = [lost_channels(group, shrinkage) for group in self._structure.groups]
        if self._gone:
            self._gone = [renumbered(gone, gone_now) for gone, gone_now in zip(self._gone, lost, strict=True)]
        groups = [smaller_group(g, shrinkage, gone) for g, gone in zip(self._structure.groups, lost, strict=True)]
        self._structure = Structure(groups, self._structure.inputs, self._structure.whole)

    @hookimpl
    def compress_strip(self, model: nn.Module, context: Context) -> None:
        """Removes channels and heads that are masked in all layers that make and read them."""
        self._stripped = Shrinkage()
        if any(self._gone):
            before = context.removed_so_far
            removed = remove_channels(model, self._structure, self._gone, before)
            if removed is not None:
                self._stripped = before.then(removed)
                context.shrunk(model, removed)

    # What the controller offers.

    @property
    def compression_rate(self) -> float:
        """Measured share of the elements with scores that is masked; training decides it, so it cannot be set."""
        return self.sparsity_level

    @property
    def importance_threshold(self) -> float:
        """What scores were compared with last; -inf before the warm-up."""
        return max((float(self._mask(name).threshold) for name in self.present), default=-math.inf)

    @property
    def importance_regularization_factor(self) -> float:
        """The present factor on the loss."""
        return self._factor

    @property
    def shrink_plan(self) -> dict[str, Any]:
        """What the last `strip` removed; JSON-able, for `compress_core.load_compressed_model`."""
        names = {member.parameter for group in self._structure.groups for member in group.members}
        return self._stripped.within(names).to_dict()

    @property
    def frozen(self) -> bool:
        """Whether the masks are frozen, that is, do not change any more."""
        return self._frozen

    def freeze(self, freeze: bool = True) -> None:
        """Freezes the masks, without loss, or lets them change again until the warm-up is over.

        Raises:
            UsageError: `freeze` is neither True nor False, or the warm-up is over.
        """
        if not isinstance(freeze, bool):
            raise UsageError(f"freeze takes True or False, got {freeze!r}")
        if self._over and not freeze:
            raise UsageError(f"the warm-up was over at epoch {self.warmup.end}, and the masks are final")
        self._set_frozen(freeze)

    # Implementation.

    @property
    def warmup(self) -> WarmUp:
        """The course of the warm-up."""
        assert self._warmup is not None, "the algorithm has not been configured"
        return self._warmup

    def kept(self, name: str) -> torch.Tensor:
        """Returns the mask of a weight or bias."""
        return self._mask(name).mask

    def _mask(self, name: str) -> MovementMask:
        return cast("MovementMask", get_weight_transform(self.model, name, self.name))

    def _has_scores(self, name: str) -> bool:
        mask = get_weight_transform(self.model, name, self.name)
        return isinstance(mask, MovementMask) and mask.scores is not None

    def _add(self, model: nn.Module, name: str, block: tuple[int, ...]) -> None:
        if get_weight_transform(model, name, self.name) is None:  # a tied one has it already
            mask = MovementMask(raw_parameter(model, name), block)
            add_weight_transform(model, name, mask, stage=Stage.SPARSITY, key=self.name)

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        for name in self.present:
            self._mask(name).frozen = frozen

    def _found_structure(self, model: nn.Module, context: Context, path: str) -> Structure:
        device = next((parameter.device for parameter in model.parameters()), None)
        try:
            trace, example = context.trace(model, path), context.example(path, device)
        except CompressionError as error:
            raise DataError(
                f"{path}.params.enable_structured_masking: true, the default, needs a trace of the model: {error}. Set "
                "it to false if no channels are to be removed"
            ) from error
        # Masks of filter pruning may cover other channels than those that are tried.
        with bypass_transforms(model):
            found = find_structure(model, trace, self._layers, example)
        if not found.groups:
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(found.whole.items())[:3])
            logger.warning(
                "%s: no channels can be removed at the end (%s); weights are masked all the same", path, reasons
            )
        return found

    def _resumed_plan(self, model: nn.Module, context: Context) -> Plan:
        plan = context.saved_plans[self.name]
        self._layers, self._structure = restored(plan, self.name, model)
        path, config = context.section(self)
        for leaf, value, _ in config.given_leaves():
            context.ledger.record(
                f"{path}.{leaf}", value, "resumed: layers and groups are those of the compression state"
            )
        return plan

    def _follow(self, clock: Clock) -> None:
        """Sets threshold, factor and masks of the present time."""
        if self._frozen:
            return
        time = self.warmup.time(clock)
        masks = [self._mask(name) for name in self.present]
        if time >= self.warmup.start and self._initial is None:
            self._initial = lowest_share(masks, _FIRST_SHARE)
            if self._initial is not None:
                logger.info("movement_sparsity: the importance threshold begins at %g", self._initial)
        self._factor = self.warmup.loss_factor(time)
        self._update(masks, self.warmup.threshold(time, self._initial))

    def _update(self, masks: list[MovementMask], threshold: float) -> None:
        with interrupts_held():  # all masks are those of one step
            for mask in masks:
                mask.update(threshold)

    def _end(self) -> None:
        """Computes the final masks, and freezes them."""
        if not self._frozen:
            self._update([self._mask(name) for name in self.present], self.warmup.final)
        present = set(self.present)
        before = self.sparsity_level

        def kept(name: str) -> torch.Tensor | None:
            return self.kept(name) if name in present else None

        self._gone = [dead_channels(group, kept) for group in self._structure.groups]
        for name, mask in structured_masks(self._structure.groups, self._gone, self._layers, kept).items():
            self._mask(name).mask.copy_(mask)
        self._over, self._factor = True, 0.0
        self._set_frozen(True)
        count = sum(len(lost) for lost in self._gone)
        logger.info(
            "movement_sparsity: the warm-up is over; %d channels and heads are masked everywhere; the level is %.4f, "
            "and was %.4f before what is masked beside them in their layers came back",
            count,
            self.sparsity_level,
            before,
        )
        if not self.counts()[0]:
            logger.warning(
                "movement_sparsity: the warm-up is over, and nothing is masked: no score is below the threshold"
            )


def _is_linear(tensor: WeightTensor) -> bool:
    parameter = tensor.parameter
    return tensor.layer.operator in LINEAR and parameter is not None and parameter.ndim == 2


def _names(layers: list[Linear]) -> tuple[str, ...]:
    return tuple(name for layer in layers for name in (layer.weight, layer.bias) if name)
