"""The loss of `rb_sparsity`: how far the share of open gates is from what is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress_learned_sparsity.rb.gates import StochasticGate

# A deviation of this share costs 1.
_SCALE = 0.05


def level_loss(gates: Sequence[StochasticGate], level: float, *, together: bool) -> torch.Tensor:
    """Returns ((share of open gates - (1 - level)) / 0.05)^2, of all gates together or summed over layers.

    The share counts gates that are open without noise; its gradient is that of the mean of sigmoid(score).

    Args:
        gates: The gates, at least one weight.
        level: Share of weights that is to be zero.
        together: Whether the level is one of all layers together.

    Returns:
        A differentiable scalar, float32 or float64, on the device of the first gate.
    """
    device = gates[0].scores.device
    counts = [torch.count_nonzero(gate.is_open()).to(device) for gate in gates]
    soft = [gate.probabilities().sum().to(device) for gate in gates]
    sizes = [gate.scores.numel() for gate in gates]
    if together:
        counts, soft, sizes = [torch.stack(counts).sum()], [torch.stack(soft).sum()], [sum(sizes)]
    losses = [
        _squared(count, total, size, level) for count, total, size in zip(counts, soft, sizes, strict=True) if size
    ]
    return torch.stack(losses).sum()


def _squared(count: torch.Tensor, soft: torch.Tensor, size: int, level: float) -> torch.Tensor:
    share = count.to(soft.dtype) / size + (soft - soft.detach()) / size
    return ((share - (1 - level)) / _SCALE) ** 2
