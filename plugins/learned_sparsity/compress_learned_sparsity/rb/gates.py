"""`StochasticGate`: the transform of `rb_sparsity`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core.transforms import WeightTransform, scaled_gradient

INITIAL_PROBABILITY = 0.99
"""Probability with which a gate is open at the beginning."""

# Uniform noise is kept this far from 0 and 1, so that its logit is finite.
_MARGIN = 1e-6


class StochasticGate(WeightTransform):
    """Multiplies each element of a weight by a gate, 0 or 1, that opens with a learned probability.

    In training mode the gate of an element with score m is open where m + logit(u) > 0, with u uniform in (0, 1): with
    the probability sigmoid(m) (a hard concrete distribution without stretching; NNCF's regularization-based sparsity).
    In eval mode it is open where m > 0. The gradient passes the threshold as if it were sigmoid (straight-through).

    The noise is drawn once for each optimizer step, from a generator that is seeded with the number of the step: all
    forwards of a step have the same, so gradients can be accumulated and activations recomputed, all ranks have the
    same, and a resumed training goes on with the same.

    Attributes:
        scores: The scores m; shape and dtype of the weight.
        mask: Which gates are open for good, bool; has a meaning while `frozen`. In a `state_dict` it is always what
            eval mode computes with.
        noise: logit(u) of the present step; not saved, because it follows from `moment`.
        moment: Number of the step for which the noise was drawn, int64 of shape ().
        frozen: Whether `mask` decides, in training mode too.
    """

    scores: torch.Tensor
    mask: torch.Tensor
    noise: torch.Tensor
    moment: torch.Tensor
    # All tensors only change between steps.
    recomputable = True
    follows: ClassVar[Mapping[str, str]] = {"scores": "weight", "mask": "weight", "noise": "weight"}

    def __init__(self, weight: torch.Tensor, *, name: str, seed: int = 0) -> None:
        super().__init__()
        initial = math.log(INITIAL_PROBABILITY / (1 - INITIAL_PROBABILITY))
        self.scores = nn.Parameter(torch.full_like(weight.detach(), initial, requires_grad=True))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        self.register_buffer("noise", torch.zeros_like(weight.detach()), persistent=False)
        self.register_buffer("moment", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.frozen = False
        self._origin = f"{seed}/{name}"
        self.draw(0)

    def draw(self, moment: int) -> None:
        """Draws the noise of an optimizer step; the same step always gets the same, on devices of one kind.

        Args:
            moment: Number of the step.
        """
        digest = hashlib.blake2b(f"{self._origin}/{moment}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=self.noise.device)
        generator.manual_seed(int.from_bytes(digest) >> 1)
        wide = torch.float64 if self.noise.dtype == torch.float64 else torch.float32
        uniform = torch.rand(self.noise.shape, generator=generator, device=self.noise.device, dtype=wide)
        self.noise.copy_(torch.special.logit(uniform, _MARGIN))
        self.moment.fill_(moment)

    def is_open(self) -> torch.Tensor:
        """Returns which gates are open without noise, boolean, of the weight's shape."""
        return self.mask if self.frozen else self.scores.detach() > 0

    def freeze(self, frozen: bool) -> None:
        """Keeps the gates that are open now, or lets the scores decide again."""
        if frozen and not self.frozen:
            self.mask.copy_(self.scores.detach() > 0)
        self.frozen = frozen

    def probabilities(self) -> torch.Tensor:
        """Returns sigmoid(scores), with the factor on their gradients."""
        scores = scaled_gradient(self.scores, self.lr_multiplier)
        return torch.sigmoid(scores.float() if scores.itemsize < 4 else scores)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight where gates are open, else 0."""
        if self.frozen:
            return self._constant(weight)
        scores = scaled_gradient(self.scores, self.lr_multiplier)
        logits = scores + self.noise if self.training else scores
        gate = (logits > 0).to(weight.dtype)
        if torch.is_grad_enabled() and self.scores.requires_grad:
            soft = torch.sigmoid(logits).to(weight.dtype)
            gate = gate + (soft - soft.detach())
        return weight * gate

    def _constant(self, weight: torch.Tensor) -> torch.Tensor:
        masked = weight * self.mask.to(weight.dtype)
        if self.training and torch.is_grad_enabled() and self.scores.requires_grad:
            # DistributedDataParallel waits for the gradient of each parameter that it was made with; this one is zero.
            masked = masked + self.scores.flatten()[:0].sum().to(weight.dtype)
        return masked

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}mask"] = self.is_open().detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        if not self.moment.is_meta and not self.noise.is_meta:
            self.draw(int(self.moment))

    def extra_repr(self) -> str:
        """Shows the weight's shape."""
        return f"shape={tuple(self.scores.shape)}"
