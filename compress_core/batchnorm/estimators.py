"""How the running statistics of one batch-norm layer are estimated anew.

An estimator watches the inputs of its layer through a forward pre-hook. It writes its estimate so far into the running
statistics before the layer normalizes with them, so that deeper layers see what they will see afterwards, at any batch
size: the first batch is normalized with its own moments, later ones with moments ever closer to the final ones.

Symbols: (mean, var) are the running statistics that training has left; (m_o, v_o) the pooled moments of the layer's
inputs in the reference (uncompressed) model and (m_c, v_c) in the compressed one, over the same samples.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compress_core.batchnorm.moments import Correlation, Moments, sampled_rows
from compress_core.contract.choices import Choice, ChoicePoint
from compress_core.errors import DataError
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.call_sites import run_quietly
from compress_core.transforms.user_hooks import is_in_hook

# Values of a channel that are paired in each sample and call, to estimate a correlation.
_PAIRED_POSITIONS = 8


class Estimator:
    """Base: gathers moments of one layer.

    Args:
        name: The layer's dotted name.
        layer: A batch norm with running statistics.
    """

    needs_reference: ClassVar[bool] = False

    def __init__(self, name: str, layer: AnyBatchNorm) -> None:
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
        return [self.layer.register_forward_pre_hook(self._quietly_before, with_kwargs=True)]

    def begin_reference(self, *, alternating: bool) -> None:
        """The next forward is the reference model's: with the statistics that training has left.

        Args:
            alternating: Whether the compressed model has had its turn with the batch before this one: calls that only
                the reference model has made of it are then forgotten.
        """
        self.in_reference = True
        if alternating:
            self.forget_waiting()
        if not self.is_fresh:
            self.write(self.mean, self.var)

    def forget_waiting(self) -> None:
        """Drops what waits for a call of the compressed model that has not come."""
        self._waiting.clear()

    def begin_compressed(self) -> None:
        """The next forward is the compressed model's."""
        self.in_reference = False

    def restore(self) -> None:
        """Puts the layer's statistics back to what they were."""
        self.write(self.mean, self.var)
        if self.tracked is not None and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.copy_(self.tracked)

    def finish(self, batches: int, path: str) -> None:
        """Leaves the final estimate in the layer.

        Args:
            batches: How many batches have passed; a fresh layer counts them as those it has seen.
            path: Where adaptation was asked for, for messages.

        Raises:
            DataError: The inputs of the layer held NaN or infinity, or one value, which has no variance.
        """
        if not (self.reference.is_finite() and self.compressed.is_finite()):
            raise DataError(
                f"{path}: the inputs of the batch norm '{self.name}' hold NaN or infinity on the calibration data; "
                "check the data and the model. All statistics are as they were"
            )
        if self.compressed.count == 1 and not self.keeps_variance_of_one_value():
            raise DataError(
                f"{path}: the batch norm '{self.name}' has seen one value for each channel, which has no variance; use "
                "more calibration samples"
            )
        if self.is_fresh and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.fill_(batches)

    def keeps_variance_of_one_value(self) -> bool:
        """Tells whether the estimate from a single value is usable all the same."""
        return False

    def write(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Sets the layer's running statistics, in their own dtype."""
        assert self.layer.running_mean is not None and self.layer.running_var is not None
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance)

    def _quietly_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A call that a user's hook makes is not the model's. Our own hook is run by the frame that called us.
        if not is_in_hook(sys._getframe(1).f_back):
            # Transforms of activations count the calls of functions; ours are not the model's.
            run_quietly(self._before, module, args, kwargs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel() == 0:
            return
        self.observe(values)
        if not self.in_reference:
            self.write(*self.estimate())
        elif self.is_fresh:
            self.write(self._fresh_reference.mean, self._fresh_reference.variance)

    def observe(self, values: torch.Tensor) -> None:
        """Takes in the inputs of one call of the layer; shape (batch, channels, ...), not empty."""
        seen = Moments.of(values)
        if not self.in_reference:
            self.compressed.merge(seen)
            if self._waiting:
                self.reference.merge(self._waiting.popleft())
            return
        self._waiting.append(seen)
        if self.is_fresh:
            self._fresh_reference.merge(seen)

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

    The gap between running statistics and moments of the sample is noise of the sample, and the difference between
    (augmented) training data and calibration data. A channel of the compressed model has it too, as far as it still is
    the channel of the uncompressed one: as far as the two correlate. So, with r = (v_c + eps) / (v_o + eps) and the
    correlation rho of the channel's values in both models:

        mean' = m_c + rho * (mean - m_o) * sqrt(r)
        var'  = v_c + rho^2 * (var * r - v_c)

    Where compression changed nothing, rho = r = 1 and nothing changes. Where nothing is left of the channel, rho = 0
    and the estimate is the exact one. This is the regression estimator with the uncompressed model as control variate
    (Cochran, Sampling Techniques, 1977, chapter 7).
    """

    needs_reference = True

    def __init__(self, name: str, layer: AnyBatchNorm) -> None:
        super().__init__(name, layer)
        self._correlation = Correlation(layer.num_features, self.mean.device)
        self._waiting_rows: deque[torch.Tensor] = deque()

    def forget_waiting(self) -> None:
        """Drops the values, too."""
        super().forget_waiting()
        self._waiting_rows.clear()

    def observe(self, values: torch.Tensor) -> None:
        """Pairs each call's values with those of the same call of the reference model."""
        super().observe(values)
        rows = sampled_rows(values, _PAIRED_POSITIONS)
        if self.in_reference:
            self._waiting_rows.append(rows)
        elif self._waiting_rows and self._waiting_rows[0].shape == rows.shape:
            self._correlation.add(self._waiting_rows.popleft(), rows)

    def keeps_variance_of_one_value(self) -> bool:
        """A trained layer keeps the variance that it has."""
        return not self.is_fresh

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the transported statistics; for a layer that was never trained, (m_c, v_c)."""
        if self.is_fresh:
            return self.compressed.mean, self.compressed.variance
        if not self.reference.count:
            return self.mean.double(), self.var.double()
        eps, variance = self.layer.eps, self.compressed.variance
        ratio = (variance + eps) / (self.reference.variance + eps)
        correlation = self._correlation.value()
        gap = self.mean.double() - self.reference.mean
        mean = self.compressed.mean + correlation * gap * ratio.sqrt()
        return mean, variance + correlation.square() * (self.var.double() * ratio - variance)


class MomentumEstimator(Estimator):
    """NNCF's: batch norm's own exponential average, layer by layer, in training mode.

    What it leaves depends on the batch size and keeps (1 - momentum)^batches of the old statistics.
    """

    def keeps_variance_of_one_value(self) -> bool:
        """One value is passed over."""
        return True

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


METHOD = "batchnorm_adaptation.method"


def _wrong(value: Any) -> str | None:
    is_estimator = isinstance(value, type) and issubclass(value, Estimator)
    return None if is_estimator else f"must be a subclass of Estimator, got {value!r}"


POINT = ChoicePoint(METHOD, "a subclass of compress_core.batchnorm.estimators.Estimator", _wrong)

CHOICES = [
    Choice(METHOD, "paired", PairedEstimator),
    Choice(METHOD, "exact", ExactEstimator),
    Choice(METHOD, "momentum", MomentumEstimator),
]
