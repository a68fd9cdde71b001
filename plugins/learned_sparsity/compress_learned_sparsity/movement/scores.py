"""`MovementMask`: the transform of `movement_sparsity`, and the quantile that limits how much it masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from compress_core.transforms import ProjectingTransform, scaled_gradient

# At most this share of a tensor's elements is masked.
_MOST = 0.98


class MovementMask(ProjectingTransform):
    """Masks the elements whose scores do not exceed a threshold; scores move against gradient times weight.

    The gradient passes the mask as if it were the scores (straight-through), so a score rises where a weight moves
    away from zero, and falls where it moves towards zero (Sanh et al. 2020, equation 6). The mask is computed at the
    beginning of each optimizer step (`update`); all forwards of the step have the same, and eval mode the last one.

    Attributes:
        scores: One for each block of elements; 0 at the beginning. None after a cut through blocks, see
            `freeze_decision`.
        mask: Which elements stay, bool, of the tensor's shape.
        threshold: What the scores were compared with last, of shape ().
        frozen: Whether the mask does not change any more.
    """

    scores: torch.Tensor | None
    mask: torch.Tensor
    threshold: torch.Tensor
    recomputable = True
    follows: ClassVar[Mapping[str, str]] = {"mask": "weight"}

    def __init__(self, tensor: torch.Tensor, block: Sequence[int]) -> None:
        super().__init__()
        grid = [size // step for size, step in zip(tensor.shape, block, strict=True)]
        self.scores = nn.Parameter(tensor.detach().new_zeros(grid))
        self.register_buffer("mask", torch.ones_like(tensor, dtype=torch.bool, requires_grad=False))
        self.register_buffer("threshold", tensor.detach().new_full((), -math.inf))
        self.frozen = False
        self.depends_on_whole_tensor = any(1 < step < size for size, step in zip(tensor.shape, block, strict=True))

    @property
    def block(self) -> tuple[int, ...]:
        """Elements that share a score, along each dimension."""
        assert self.scores is not None
        return tuple(size // steps for size, steps in zip(self.mask.shape, self.scores.shape, strict=True))

    def expanded(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values of blocks as values of elements, of the tensor's shape."""
        for dim, step in enumerate(self.block):
            if step > 1 and values.shape[dim] > 1:
                values = values.repeat_interleave(step, dim)
        return values.expand(self.mask.shape)

    def update(self, threshold: float) -> None:
        """Computes the mask for a threshold.

        Where the threshold would mask more than 98 % of the elements, their quantile takes its place. At least the
        elements with the largest score stay.

        Args:
            threshold: -inf masks nothing.
        """
        if self.scores is None or self.scores.numel() == 0:
            return
        scores = self.scores.detach()
        limit = capped(scores, math.prod(self.block), threshold)
        # None exceeds the quantile where all are equal, or where the block with the largest has more than 2 %.
        kept = (scores > limit) | ((scores >= limit) & (scores.max() <= limit))
        self.mask.copy_(self.expanded(kept))
        self.threshold.copy_(limit)

    def regularization(self) -> torch.Tensor:
        """Returns mean(sigmoid(scores)) times the elements of a block, with the factor on its gradient."""
        assert self.scores is not None
        scores = scaled_gradient(self.scores, self.lr_multiplier)
        wide = scores.float() if scores.itemsize < 4 else scores
        return torch.sigmoid(wide).mean() * math.prod(self.block)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the tensor with masked elements at 0."""
        mask = self.mask.to(weight.dtype)
        scores = self.scores
        if scores is None or not (self.training and torch.is_grad_enabled() and scores.requires_grad):
            return weight * mask
        if self.frozen:
            # DistributedDataParallel waits for the gradient of each parameter that it was made with; this one is zero.
            return weight * mask + scores.flatten()[:0].sum().to(weight.dtype)
        soft = self.expanded(scaled_gradient(scores, self.lr_multiplier)).to(weight.dtype)
        return weight * (mask + (soft - soft.detach()))

    def support(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the mask."""
        return self.mask

    def shrunk_dims(
        self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], kept: Mapping[int, Sequence[int]]
    ) -> Mapping[int, Sequence[int]] | None:
        """Cuts the scores with the tensor; see `WeightTransform`."""
        if name != "scores":
            return None
        return {dim: indices for dim, indices in kept.items() if dim < tensor.ndim and tensor.shape[dim] > 1}

    def freeze_decision(self, weight: torch.Tensor) -> None:
        """Gives the scores up, because a cut may go through blocks; the mask stays as it is."""
        self.scores = None
        self.frozen = True
        self.depends_on_whole_tensor = False

    def extra_repr(self) -> str:
        """Shows the shape and the block."""
        block = None if self.scores is None else self.block
        return f"shape={tuple(self.mask.shape)}, block={block}"


def capped(scores: torch.Tensor, elements: int, threshold: float) -> torch.Tensor:
    """Returns the smaller one of a threshold and the 98 % quantile of the elements' scores.

    The quantile interpolates linearly, as `torch.quantile` does of the expanded scores, however many there are.

    Args:
        scores: The scores of blocks, not empty.
        elements: Elements in a block.
        threshold: The threshold.

    Returns:
        A tensor of shape (), of the dtype of the scores.
    """
    limit = scores.new_full((), threshold)
    if threshold == -math.inf:
        return limit
    flat = (scores if scores.itemsize >= 4 else scores.float()).flatten()
    place = _MOST * (flat.numel() * elements - 1)
    low, high = math.floor(place), math.ceil(place)
    below = flat.kthvalue(low // elements + 1).values
    above = flat.kthvalue(high // elements + 1).values
    return torch.minimum(limit, torch.lerp(below, above, place - low).to(limit.dtype))


def lowest_share(masks: Sequence[MovementMask], share: float) -> float | None:
    """Returns the k-th smallest score over all elements, k = min(n, int(share * n) + 1); None if all are equal.

    Args:
        masks: The transforms.
        share: Share of the elements.
    """
    parts = [(mask.scores.detach().flatten(), math.prod(mask.block)) for mask in masks if mask.scores is not None]
    if not parts:
        return None
    device = parts[0][0].device
    scores = torch.cat([values.to(device, torch.float64) for values, _ in parts])
    if float(scores.min()) == float(scores.max()):
        return None
    counts = torch.cat([torch.full_like(values, count, dtype=torch.int64, device=device) for values, count in parts])
    total = int(counts.sum())
    wanted = min(total, int(share * total) + 1)
    values, order = scores.sort()
    place = int(torch.searchsorted(counts[order].cumsum(0), wanted))
    return float(values[place])
