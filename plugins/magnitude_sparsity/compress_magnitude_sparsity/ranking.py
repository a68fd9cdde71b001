"""Computes masks: from the stored weights alone, or in changes of masks that were chosen with data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress_core import Stage
from compress_core.transforms import raw_parameter
from compress_core.transforms.checkpoints import mark_filled
from compress_core.transforms.weight import transformed_weight
from compress_magnitude_sparsity.importance import Importance, needs_data, ranked
from compress_magnitude_sparsity.rated_mask import RatedMask
from compress_magnitude_sparsity.selection import RankedTensor, layer_scale, select


@dataclass(frozen=True)
class Ranking:
    """Sets the masks of weights.

    Attributes:
        model: The model.
        masks: The masks by the name of their weight.
        importance: What weights are ranked by.
    """

    model: nn.Module
    masks: Mapping[str, RatedMask]
    importance: Importance

    def set_level(self, level: float, *, together: bool, chosen: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sets the masks to a level.

        Everything that can fail happens before the first mask is changed.

        Args:
            level: Share of the elements to mask.
            together: Whether the level holds for all weights together, else for each one.
            chosen: Masks that were chosen with data for this level; at the creation.
        """
        selections = []
        for names, count in self._groups(level, together=together, chosen=chosen):
            masks = [self.masks[name].mask for name in names]
            tensors = self._ranked(names, count, chosen)
            if tensors is not None:
                selections.append((select(tensors, count), masks))
        for selection, masks in selections:
            selection.write(masks)
        for mask in self.masks.values():
            mask.is_outdated = False
        mark_filled(self.masks.values())

    def zeros_at(self, level: float, *, together: bool) -> dict[str, int]:
        """Returns how many elements of each weight a level would mask by the present weights; changes no mask.

        For importances that need no data.
        """
        found = {}
        for names, count in self._groups(level, together=together, chosen=None):
            tensors = self._ranked(names, count, None)
            assert tensors is not None, "without data, all weights are ranked"
            masks = [torch.empty_like(self.masks[name].mask) for name in names]
            select(tensors, count).write(masks)
            kept = {name: int(torch.count_nonzero(mask)) for name, mask in zip(names, masks, strict=True)}
            found.update({name: self.masks[name].mask.numel() - number for name, number in kept.items()})
        return found

    def _groups(
        self, level: float, *, together: bool, chosen: Mapping[str, torch.Tensor] | None
    ) -> list[tuple[list[str], int]]:
        """Returns the weights that are ranked together, and the number of zeros among them."""
        sizes = {name: mask.mask.numel() for name, mask in self.masks.items()}
        if not together:
            return [([name], round(level * size)) for name, size in sizes.items()]
        # What data has shown nothing of cannot be compared with the others.
        apart = self._unknown(chosen)
        if len(apart) == len(sizes):
            apart = []
        groups = [([name], min(round(level * sizes[name]), max(sizes[name] - 1, 0))) for name in apart]
        others = [name for name in sizes if name not in apart]
        rest = round(level * sum(sizes.values())) - sum(count for _, count in groups)
        return [(others, max(rest, 0)), *groups]

    def _unknown(self, chosen: Mapping[str, torch.Tensor] | None) -> list[str]:
        if not needs_data(self.importance):
            return []
        if self.importance.returns == "factors":
            return [name for name, mask in self.masks.items() if mask.factor is None]
        return [] if chosen is None else [name for name in self.masks if name not in chosen]

    def _ranked(
        self, names: Sequence[str], count: int, chosen: Mapping[str, torch.Tensor] | None
    ) -> list[RankedTensor] | None:
        """Returns weights to rank for so many zeros; None if their masks stay as they are."""
        importance = self.importance
        if not needs_data(importance):
            return [ranked(name, raw_parameter(self.model, name).detach(), importance) for name in names]
        masks = [self.masks[name] for name in names]
        values = {name: self._measured(name) for name in names}
        if chosen is not None and all(name in chosen for name in names):
            # What stays first, then what earlier stages have left; nothing else decides but for a few elements.
            return [
                RankedTensor(name, _below_one(value).add_(chosen[name], alpha=2).add_(value > 0))
                for name, value in values.items()
            ]
        zeros = sum(mask.mask.numel() - int(torch.count_nonzero(mask.mask)) for mask in masks)
        if zeros == 0 or any(mask.is_outdated for mask in masks):
            return [RankedTensor(name, value) for name, value in values.items()]
        if count == zeros:
            return None
        changed = _adding_zeros if count > zeros else _taking_zeros
        return [RankedTensor(name, changed(values[name], self.masks[name].mask)) for name in names]

    def _measured(self, name: str) -> torch.Tensor:
        """Returns importances by what data has shown, as far as earlier stages have left the elements."""
        value = transformed_weight(self.model, name, Stage.SPARSITY)
        wide = value.abs() if value.dtype == torch.float64 else value.float().abs()
        factor = self.masks[name].factor
        return wide / layer_scale(wide) if factor is None else wide * factor.to(wide.dtype)


def _below_one(values: torch.Tensor) -> torch.Tensor:
    """Returns importances in the same order, between 0 and 1/2; they are never all 0 and infinite."""
    largest = values.max() if values.numel() else values.new_zeros(())
    return values / (2 * largest).clamp_min(torch.finfo(values.dtype).tiny)


def _adding_zeros(importance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns importances with which all that is masked is masked first; what is kept comes after it, even if 0."""
    limits = torch.finfo(importance.dtype)
    return importance.clamp(limits.tiny, limits.max).mul_(mask)


def _taking_zeros(importance: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns importances with which all that is kept is kept first."""
    limits = torch.finfo(importance.dtype)
    return importance.clamp(0, limits.max / 2).masked_fill_(mask, limits.max)


def supports(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns which elements of weights the transforms of earlier stages have left, bool."""
    found = {}
    for name in names:
        left = transformed_weight(model, name, Stage.SPARSITY)
        found[name] = (left != 0) | (raw_parameter(model, name).detach() == 0)
    return found
