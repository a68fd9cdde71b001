"""Which elements of weights to keep, found in steps with a least-squares solution between.

Removing a few elements, letting the others make up for it, and looking at the magnitudes that these then have, tells
far more than the magnitudes of the beginning.

Memory: two float32 and two bools for each element, and what `solve` takes for one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core import UsageError
from compress_weight_reconstruction.solvers.freedom import Freedom
from compress_weight_reconstruction.solvers.least_squares import least_squares
from compress_weight_reconstruction.solvers.moments import Normal
from compress_weight_reconstruction.solvers.numerics import full_precision, is_finite
from compress_weight_reconstruction.solvers.scores import Score, column_importance
from compress_weight_reconstruction.solvers.solve import WORKSPACE, row_blocks
from compress_weight_reconstruction.solvers.system import System

# Products with the Gram matrix after each decision, where these are cheaper than an exact solution. Each begins where
# the last one has ended, so a few bring the magnitudes close enough to rank them.
_SWEEPS = 8


@dataclass(frozen=True)
class RankedLayer:
    """A weight whose elements are ranked together with those of other layers.

    Attributes:
        weight: Shape (groups, rows, columns).
        normal: Moments of its inputs, and of targets: the outputs of the uncompressed model.
        scale: Divides the scores of its elements: 1, or the norm of the weight.
        support: Elements that may be kept, bool; None for all.
    """

    weight: Tensor
    normal: Normal
    scale: float = 1.0
    support: Tensor | None = None

    def check(self, index: int) -> None:
        """Raises a UsageError, which calls this layer by its index, where its parts do not fit."""
        if self.weight.shape != self.normal.cross.shape or not is_finite(self.weight):
            raise UsageError(
                f"The weight of layer {index}, of shape {tuple(self.weight.shape)}, has to be finite and of the shape "
                f"of its moments, {tuple(self.normal.cross.shape)}."
            )
        if not 0 < self.scale < math.inf:
            raise UsageError(f"scale of layer {index} is {self.scale}; it divides scores: positive and finite.")
        Freedom(support=self.support).check(self.weight)


def select_in_steps(
    layers: Sequence[RankedLayer],
    density: float,
    steps: int,
    *,
    damping: float,
    score: Score = "magnitude",
    workspace: int = WORKSPACE,
) -> list[Tensor]:
    """Returns the elements to keep of each layer, bool.

    The density falls geometrically. After each step but the last, the weights are solved for on what is left, and
    their scores `|w| sqrt(importance) / scale`, over all layers, decide the next. Each layer keeps at least one.

    Args:
        layers: One layer, or several that share the density.
        density: Part of all elements that is kept, above 0 and at most 1.
        steps: 1 is one decision with the weights as they are; 4 to 16 are good.
        damping: As in `solve`; 0.1, with few samples 0.3.
        score: Factor of the importance, see `column_importance`. In several steps magnitude is as good as any.
        workspace: As in `solve`.
    """
    if not 0 < density <= 1:
        raise UsageError(f"density is {density}; it is the part of elements that is kept, above 0 and at most 1.")
    if steps < 1:
        raise UsageError(f"steps is {steps}; at least one decision has to be taken.")
    for index, layer in enumerate(layers):
        layer.check(index)
    factors = [column_importance(layer.normal, score, damping=damping).sqrt() / layer.scale for layer in layers]
    supports = [torch.ones_like(x.weight, dtype=torch.bool) if x.support is None else x.support for x in layers]
    begin = sum(int(support.sum()) for support in supports)
    wanted = max(round(density * sum(support.numel() for support in supports)), len(layers))
    if wanted >= begin:
        return supports

    fitted = [layer.weight.detach() for layer in layers]
    for step in range(1, steps + 1):
        for index, (layer, support) in enumerate(zip(layers, supports, strict=True)):
            if step > 1:
                fitted[index] = _refitted(layer, fitted[index], support, damping, workspace)
        scores = [_scores(*each) for each in zip(fitted, factors, supports, strict=True)]
        supports = largest(scores, round(begin * (wanted / begin) ** (step / steps)))
    return supports


def _refitted(layer: RankedLayer, fitted: Tensor, support: Tensor, damping: float, workspace: int) -> Tensor:
    """Returns nearly the least-squares weight on a support, coming from that on a larger one; float32 or float64."""
    with full_precision(fitted.device):
        system = System(layer.normal, damping)
        result = torch.empty_like(fitted, dtype=system.dtype)
        for rows in row_blocks(fitted, Freedom(support=support), workspace // 4):
            kept, cross = support[:, rows], layer.normal.cross[:, rows]
            start = fitted[:, rows].to(torch.float64) * kept
            # The damping pulls towards the weight before compression, wherever the last step has led. In float64: it is
            # in the units of squared inputs, which float32 may not hold.
            old = layer.weight[:, rows].detach().to(start.dtype, copy=True)
            pull = old.mul_(kept).sub_(start).mul_(system.ridge[:, None])
            residual = system.residual(start, cross).add_(pull)
            scaled, size = system.in_units(residual)
            update = least_squares(system, scaled, kept, workspace // 2, sweeps=_SWEEPS)
            result[:, rows] = system.from_units(update, size).add_(start)
    return result


def _scores(weight: Tensor, factor: Tensor, support: Tensor) -> Tensor:
    """Returns scores in float32; those of elements that are gone are 0, and those of others above it."""
    with full_precision(weight.device):
        scores = (weight.to(factor.dtype).abs() * factor[:, None]).to(torch.float32)
        limits = torch.finfo(torch.float32)
        return scores.clamp_(limits.tiny, limits.max).mul_(support).contiguous()


def largest(scores: Sequence[Tensor], number: int) -> list[Tensor]:
    """Returns a mask of the so many largest scores over all tensors, the largest of each among them unless it is 0.

    Of equal scores, those that come first are kept. The scores are never concatenated nor sorted: for positive floats
    the order of values is that of their bits, and the smallest score that is kept is found bit by bit.

    Args:
        scores: float32, contiguous, 0 or above; overwritten.
        number: How many to keep, at least one for each tensor.
    """
    bits = [x.view(torch.int32).flatten() for x in scores]
    for x in bits:
        first = x.argmax()
        x[first] = torch.where(x[first] > 0, torch.iinfo(torch.int32).max, 0)
    threshold = 0
    for bit in range(30, -1, -1):
        higher = threshold | (1 << bit)
        if sum(int((x >= higher).sum()) for x in bits) >= number:
            threshold = higher
    spare = number - sum(int((x > threshold).sum()) for x in bits)
    masks = []
    for x, score in zip(bits, scores, strict=True):
        equal = (x == threshold).nonzero().flatten()[: max(0, spare)]
        spare -= len(equal)
        mask = x > threshold
        mask[equal] = True
        masks.append(mask.view(score.shape))
    return masks
