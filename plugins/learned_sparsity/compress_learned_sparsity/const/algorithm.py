"""The algorithm `const_sparsity`: the weights that are zero stay zero."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn

from compress_core import AlgorithmConfig, CompressionStage, Plan, Stage, hookimpl
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.masked_weights import MaskingAlgorithm
from compress_core.contract.sparsity_statistics import SparsityStatistics
from compress_core.transforms import WeightMask, add_weight_transform, get_weight_transform, raw_parameter
from compress_core.transforms.checkpoints import mark_awaiting

logger = logging.getLogger(__name__)


class ConstSparsityConfig(AlgorithmConfig):
    """Section of the algorithm `const_sparsity`."""

    algorithm: Literal["const_sparsity"] = Field(description="name of the algorithm")


class ConstSparsityStatistics(SparsityStatistics):
    """Measured levels."""

    title: ClassVar[str] = "Constant sparsity"


class ConstMask(WeightMask):
    """A mask that takes over those of other algorithms from a checkpoint."""

    def adopted(
        self, others: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> tuple[set[str], dict[str, torch.Tensor]] | None:
        """Returns the common mask of transforms that have a `mask`; see `WeightTransform.adopted`."""
        found = {key: entries["mask"] for key, entries in others.items() if _fits(entries.get("mask"), self.mask)}
        if not found:
            return None
        common = torch.ones_like(self.mask)
        for mask in found.values():
            common &= (mask != 0).to(common.device)
        return set(found), {"mask": common}


def _fits(mask: torch.Tensor | None, own: torch.Tensor) -> bool:
    if mask is None or mask.ndim != own.ndim:
        return False
    sizes = all(size in (1, wanted) for size, wanted in zip(mask.shape, own.shape, strict=True))
    return sizes and bool(((mask == 0) | (mask == 1)).all())


class ConstSparsity(MaskingAlgorithm):
    """Keeps a pattern of zeros while a sparse model is quantized or trained further.

    The mask of a weight is what is not zero when the compressed model is created. A checkpoint that is loaded
    afterwards brings its own masks, those of other algorithms of sparsity included.
    """

    name = "const_sparsity"
    Config: ClassVar[type[AlgorithmConfig]] = ConstSparsityConfig
    stage = Stage.SPARSITY
    controller_api = ("sparsity_level", "sparsified_module_info")

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses values that nobody reads."""
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans to mask every weight that the scopes allow, trained or not."""
        return self.plan_masks(model, context)

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan, context: Context) -> None:
        """Masks what is zero."""
        self.remember(plan)
        for name in plan.targets:
            if get_weight_transform(model, name, self.name) is None:  # a tied weight has it already
                mask = raw_parameter(model, name).detach() != 0
                add_weight_transform(model, name, ConstMask(mask), stage=Stage.SPARSITY, key=self.name)
        if context.resuming:
            mark_awaiting(self._mask(name) for name in self.present)
        elif not self.counts()[0]:
            path, _ = context.section(self)
            logger.warning(
                "%s: no weight of this model is zero, so nothing is masked unless a state_dict with masks is loaded",
                path,
            )

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> ConstSparsityStatistics:
        """Counts the masked weights."""
        return ConstSparsityStatistics(**self.measured(model))

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Nothing more will be masked."""
        return CompressionStage.FULLY_COMPRESSED

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts what is masked, which stays as it is."""
        return self.with_masks(footprint)

    @property
    def compression_rate(self) -> float:
        """The measured share of masked weights; it cannot be set."""
        return self.sparsity_level

    def kept(self, name: str) -> torch.Tensor:
        """Returns the mask of a weight."""
        return self._mask(name).mask

    def _mask(self, name: str) -> ConstMask:
        return cast("ConstMask", get_weight_transform(self.model, name, self.name))
