"""Channel moments that can be pooled: over batches, over calls of a layer, over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows of a channels_last tensor that are summed in float32 at a time, and the |mean| / std from which on a mean in
# float32 is not exact enough: together they keep the variance within 1e-6 of float64.
_ROWS = 256
_LARGEST_OFFSET = 4.0


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel; a mergeable object.

    Merging is exact (Chan, Golub & LeVeque 1979, equation 2.1): the result does not depend, beyond rounding in float64,
    on how values were split into parts or in which order these are merged. `Moments.empty` is the neutral element.

    Attributes:
        count: Number of values in each channel.
        mean: Their mean; float64, shape (channels,).
        m2: Sum of their squared deviations from the mean; float64, shape (channels,).
    """

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | None = None) -> Moments:
        """Returns the moments of nothing."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    @classmethod
    def of(cls, values: torch.Tensor) -> Moments:
        """Returns the moments of a tensor of shape (batch, channels, ...), over all dimensions but the second.

        The sums run in float64, inside torch's own batch-norm kernel where there is one, on a wide copy elsewhere.
        """
        channels = values.shape[1]
        count = values.numel() // channels if channels else 0
        if count == 0:
            return cls.empty(channels, values.device)
        if values.dtype == torch.float32 and values.device.type == "cpu":
            return cls._by_kernel(values, count)
        return cls._in_float64(values, count)

    @classmethod
    def _by_kernel(cls, values: torch.Tensor, count: int) -> Moments:
        mean, variance = _kernel(values)
        if bool((mean.square() > _LARGEST_OFFSET**2 * variance).any()):
            # The kernel returns the mean in float32: far from zero that is not exact enough to pool with. Once the bulk
            # of it is subtracted, what is left is small, and exact.
            bulk = mean.to(values.dtype)
            rest, variance = _kernel(values - bulk.view(1, -1, *[1] * (values.ndim - 2)))
            mean = bulk.double() + rest
        return cls(count, mean, variance * count)

    @classmethod
    def _in_float64(cls, values: torch.Tensor, count: int) -> Moments:
        wide = values.double() if values.device.type != "mps" else values.float()  # MPS has no float64
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(wide, dim=dims, correction=0)
        return cls(count, mean.double(), variance.double() * count)

    def merge(self, other: Moments) -> None:
        """Adds what `other` has seen to this."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta.square() * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """Population variance of each channel; float64, shape (channels,)."""
        return self.m2 / max(self.count, 1)

    def is_finite(self) -> bool:
        """Tells whether no channel has seen NaN or infinity."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())


class Correlation:
    """Correlation of two versions of the same values, channel by channel; gathered in pieces.

    Pieces are merged as in `Moments` (Pebay 2008, equation 3.11 for the co-moment).

    Args:
        channels: Number of channels.
        device: Where the sums are kept.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self._left = Moments.empty(channels, device)
        self._right = Moments.empty(channels, device)
        self._comoment = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds paired values, each of shape (values, channels)."""
        left, right = left.double(), right.double()
        mean_left, mean_right = left.mean(0), right.mean(0)
        apart_left, apart_right = left - mean_left, right - mean_right
        count, before = len(left), self._left.count
        shift = (mean_left - self._left.mean) * (mean_right - self._right.mean)
        self._comoment += (apart_left * apart_right).sum(0) + shift * (before * count / (before + count))
        self._left.merge(Moments(count, mean_left, apart_left.square().sum(0)))
        self._right.merge(Moments(count, mean_right, apart_right.square().sum(0)))

    def value(self) -> torch.Tensor:
        """Returns Pearson's correlation of each channel; 1 where neither varies, 0 where only one does."""
        scale = self._left.m2.sqrt() * self._right.m2.sqrt()
        constant = ((self._left.m2 == 0) & (self._right.m2 == 0)).double()
        return torch.where(scale > 0, self._comoment / scale, constant).clamp(-1.0, 1.0)


def sampled_rows(values: torch.Tensor, limit: int) -> torch.Tensor:
    """Returns up to `limit` of the values of each channel, evenly spread, as a copy of shape (values, channels).

    The choice depends on the shape alone: tensors of one shape are sampled at the same places.
    """
    positions = values.numel() // (values.shape[0] * values.shape[1])
    total = values.shape[0] * positions
    # An odd stride does not fall into step with the width of an image.
    stride = max(total // limit, 1)
    stride -= 1 - stride % 2
    index = torch.arange(min(limit, total), device=values.device) * max(stride, 1)
    return values.reshape(*values.shape[:2], positions)[index // positions, :, index % positions]


def _kernel(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance of each channel by torch's batch-norm kernel; float64 that holds float32 precision."""
    if not _is_channels_last(values):
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean.double(), variance.double()
    # In this layout the kernel adds up in float32: short pieces keep its error small, float64 merges them.
    rows = values.movedim(1, -1).reshape(-1, values.shape[1])
    pieces = [torch.batch_norm_update_stats(piece, None, None, 0.0) for piece in torch.split(rows, _ROWS)]
    means = torch.stack([mean for mean, _ in pieces]).double()
    variances = torch.stack([variance for _, variance in pieces]).double()
    weights = torch.full((len(pieces), 1), float(_ROWS), dtype=torch.float64)
    weights[-1] = len(rows) - _ROWS * (len(pieces) - 1)
    weights /= len(rows)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def _is_channels_last(values: torch.Tensor) -> bool:
    if values.is_contiguous():
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return values.ndim in formats and values.is_contiguous(memory_format=formats[values.ndim])
