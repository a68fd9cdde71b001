"""How the running statistics of one batch-norm layer are estimated anew.

An estimator watches the inputs of its layer through a forward pre-hook. It writes its estimate so far into the running
statistics before the layer normalizes with them, so that deeper layers see what they will see afterwards, at any batch
size: the first batch is normalized with its own moments, later ones with moments ever closer to the final ones.

Symbols: (mean, var) are the running statistics that training has left; (m_o, v_o) the pooled moments of the layer's
inputs in the reference (uncompressed) model and (m_c, v_c) in the compressed one, over the same samples.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from compress_core.errors import DataError
from compress_core.initializers.moments import Moments


class Estimator:
    """Base: gathers moments of one layer.

    Args:
        name: The layer's dotted name.
        layer: A batch norm with running statistics.
    """

    needs_reference: ClassVar[bool] = False

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        self.name = name
        self.layer = layer
        self.mean = layer.running_mean.detach().clone()
        self.var = layer.running_var.detach().clone()
        self.tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        # A layer that no batch has passed in training still has the values it was made with. `num_batches_tracked` does
        # not tell: checkpoints older than torch 0.4.1 have none, and load as zero.
        self.is_fresh = not bool(self.mean.any()) and bool((self.var == 1).all())
        self.reference = Moments.empty(layer.num_features, self.mean.device)
        # What the reference model's calls have seen, until the compressed model makes the same call: at each point both
        # estimates must rest on the same calls, or a model without any change would seem to have one.
        self._waiting: deque[Moments] = deque()
        self.compressed = Moments.empty(layer.num_features, self.mean.device)
        self._fresh_reference = Moments.empty(layer.num_features, self.mean.device)
        self.in_reference = False

    def attach(self) -> list[RemovableHandle]:
        """Starts watching; the caller removes the handles."""
        return [self.layer.register_forward_pre_hook(self._before, with_kwargs=True)]

    def begin_reference(self) -> None:
        """The next forward is the reference model's: with the statistics that training has left."""
        self.in_reference = True
        if not self.is_fresh:
            self.write(self.mean, self.var)

    def begin_compressed(self) -> None:
        """The next forward is the compressed model's."""
        self.in_reference = False

    def restore(self) -> None:
        """Puts the layer's statistics back to what they were."""
        self.write(self.mean, self.var)
        if self.tracked is not None and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.copy_(self.tracked)

    def finish(self, batches: int) -> None:
        """Leaves the final estimate in the layer.

        Args:
            batches: How many batches have passed; a fresh layer counts them as those it has seen.

        Raises:
            DataError: The inputs of the layer held NaN or infinity.
        """
        if not (self.reference.is_finite() and self.compressed.is_finite()):
            raise DataError(
                f"the inputs of the batch norm '{self.name}' hold NaN or infinity on the calibration data; check the "
                "data and the model. All statistics are as they were"
            )
        if self.is_fresh and self.compressed.count and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.fill_(batches)

    def write(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Sets the layer's running statistics, in their own dtype."""
        assert self.layer.running_mean is not None and self.layer.running_var is not None
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel() == 0:
            return
        seen = Moments.of(values)
        if self.in_reference:
            self._waiting.append(seen)
            if self.is_fresh:
                self._fresh_reference.merge(seen)
                self.write(self._fresh_reference.mean, self._fresh_reference.variance)
            return
        self.compressed.merge(seen)
        if self._waiting:
            self.reference.merge(self._waiting.popleft())
        self.write(*self.estimate())

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the running mean and variance that follow from what has been seen; shape (channels,) each."""
        raise NotImplementedError


class ExactEstimator(Estimator):
    """The population moments of the compressed model: mean' = m_c, var' = v_c."""

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (m_c, v_c)."""
        return self.compressed.mean, self.compressed.variance


class PairedEstimator(Estimator):
    """Carries what training has learned across the change that compression made.

    With r = (v_c + eps) / (v_o + eps): var' = var * r, mean' = m_c + (mean - m_o) * sqrt(r). Where compression changed
    nothing, nothing changes; sampling noise, and the gap between augmented training data and calibration data, are in
    both moments and cancel.
    """

    needs_reference = True

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the transported statistics; for a layer that was never trained, (m_c, v_c)."""
        if self.is_fresh:
            return self.compressed.mean, self.compressed.variance
        if not self.reference.count:
            return self.mean.double(), self.var.double()
        eps = self.layer.eps
        ratio = (self.compressed.variance + eps) / (self.reference.variance + eps)
        mean = self.compressed.mean + (self.mean.double() - self.reference.mean) * ratio.sqrt()
        return mean, self.var.double() * ratio


class MomentumEstimator(Estimator):
    """NNCF's: batch norm's own exponential average, layer by layer, in training mode.

    What it leaves depends on the batch size and keeps (1 - momentum)^batches of the old statistics.
    """

    def attach(self) -> list[RemovableHandle]:
        """Puts the layer into training mode for the time of its forward."""
        after = self.layer.register_forward_hook(self._after, always_call=True)
        return [*super().attach(), after]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel() == 0:
            return
        self.compressed.merge(Moments.of(values))
        # One value has no variance: torch refuses to train on it, so it passes with the statistics as they are.
        self.layer.training = values.numel() > values.shape[1]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layer.training = False


ESTIMATORS: dict[str, type[Estimator]] = {
    "paired": PairedEstimator,
    "exact": ExactEstimator,
    "momentum": MomentumEstimator,
}
