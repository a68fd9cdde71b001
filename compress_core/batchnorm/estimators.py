"""Estimators of the running statistics of one batch-norm layer.

An estimator observes the inputs of its layer through a forward pre-hook. It writes its current estimate into the
running statistics before the layer normalizes with them, so that deeper layers see the inputs that they will see
afterwards, at any batch size: the first batch is normalized with its own moments, later ones with moments ever closer
to the final ones.

Symbols: (mean, var) are the trained running statistics; (m_o, v_o) are the pooled moments of the layer's inputs in the
reference (uncompressed) model and (m_c, v_c) in the compressed model, over the same samples.
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

# Number of values of a channel that are paired in each sample and call, to estimate a correlation.
_PAIRED_POSITIONS = 8


class Estimator:
    """Base class of estimators: collects the moments of the inputs of one layer.

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
        # A layer that was never trained still has its initial values. `num_batches_tracked` is not reliable: it is not
        # in checkpoints older than torch 0.4.1, and then loads as zero.
        self.is_fresh = not bool(self.mean.any()) and bool((self.var == 1).all())
        self.reference = Moments.empty(layer.num_features, self.mean.device)
        # Moments of calls of the reference model that wait for the same call of the compressed model. Both estimates
        # must always use the same calls; otherwise an unchanged model would appear to have changed.
        self._waiting: deque[Moments] = deque()
        self.compressed = Moments.empty(layer.num_features, self.mean.device)
        self._fresh_reference = Moments.empty(layer.num_features, self.mean.device)
        self.in_reference = False

    def attach(self) -> list[RemovableHandle]:
        """Registers the hooks on the layer; the caller removes the handles."""
        return [self.layer.register_forward_pre_hook(self._quietly_before, with_kwargs=True)]

    def begin_reference(self, *, alternating: bool) -> None:
        """Prepares for a forward of the reference model, with the trained statistics.

        Args:
            alternating: Whether the compressed model has already seen the previous batch. Calls on that batch that only
                the reference model made are then dropped.
        """
        self.in_reference = True
        if alternating:
            self.forget_waiting()
        if not self.is_fresh:
            self.write(self.mean, self.var)

    def forget_waiting(self) -> None:
        """Drops moments of the reference model for which the compressed model made no call."""
        self._waiting.clear()

    def begin_compressed(self) -> None:
        """Prepares for a forward of the compressed model."""
        self.in_reference = False

    def restore(self) -> None:
        """Restores the trained statistics of the layer."""
        self.write(self.mean, self.var)
        if self.tracked is not None and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.copy_(self.tracked)

    def finish(self, batches: int, path: str) -> None:
        """Writes the final estimate to the layer.

        Args:
            batches: Number of batches; becomes `num_batches_tracked` of a layer that was never trained.
            path: Config path of the request, for messages.

        Raises:
            DataError: The inputs of the layer held NaN or infinity, or only one value, which has no variance.
        """
        if not (self.reference.is_finite() and self.compressed.is_finite()):
            what = f"the inputs of the batch norm '{self.name}' hold NaN or infinity on the calibration data"
            blame = "check the data and the model"
            if self.reference.count and self.reference.is_finite():
                what += " in the compressed model, and are finite in the uncompressed one"
                blame = "name the layers in front of it, such as one that makes a denominator, in ignored_scopes"
            raise DataError(f"{path}: {what}; {blame}. The statistics were not changed")
        if self.compressed.count == 1 and not self.keeps_variance_of_one_value():
            raise DataError(
                f"{path}: the batch norm '{self.name}' has seen one value for each channel, which has no variance; use "
                "more calibration samples"
            )
        if self.is_fresh and self.layer.num_batches_tracked is not None:
            self.layer.num_batches_tracked.fill_(batches)

    def keeps_variance_of_one_value(self) -> bool:
        """Returns whether the estimate is usable even if the layer has seen only one value."""
        return False

    def write(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Sets the layer's running statistics, in their own dtype."""
        assert self.layer.running_mean is not None and self.layer.running_var is not None
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance)

    def _quietly_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Calls made by a user's hook do not count. Our own hook is run by the frame that called us.
        if not is_in_hook(sys._getframe(1).f_back):
            # Activation transforms count function calls, and the calls in here must not be counted.
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
        """Adds the inputs of one call of the layer; shape (batch, channels, ...), not empty."""
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
        """Returns the current estimate of the running mean and variance; shape (channels,) each."""
        raise NotImplementedError


class ExactEstimator(Estimator):
    """Estimates the population moments of the compressed model: mean' = m_c, var' = v_c."""

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (m_c, v_c)."""
        return self.compressed.mean, self.compressed.variance


class PairedEstimator(Estimator):
    """Corrects the trained statistics by the change that compression made, instead of replacing them.

    The gap between the running statistics and the measured moments is sampling noise plus the difference between
    (augmented) training data and calibration data. A channel of the compressed model has the same gap, to the degree
    that it correlates with the channel of the uncompressed model. So, with r = (v_c + eps) / (v_o + eps) and the
    correlation rho of the channel's values in both models:

        mean' = m_c + rho * (mean - m_o) * sqrt(r)
        var'  = v_c + rho^2 * (var * r - v_c)

    If compression did not change a channel, rho = r = 1 and its statistics stay. If nothing is left of a channel,
    rho = 0 and the estimate is (m_c, v_c). This is the regression estimator with the uncompressed model as control
    variate (Cochran, Sampling Techniques, 1977, chapter 7).
    """

    needs_reference = True

    def __init__(self, name: str, layer: AnyBatchNorm) -> None:
        super().__init__(name, layer)
        self._correlation = Correlation(layer.num_features, self.mean.device)
        self._waiting_rows: deque[torch.Tensor] = deque()

    def forget_waiting(self) -> None:
        """Also drops the values that wait to be paired."""
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
        """True for a trained layer, which then keeps its variance."""
        return not self.is_fresh

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the corrected statistics; for a layer that was never trained, (m_c, v_c)."""
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
    """NNCF's estimator: the layer's own exponential average, in training mode.

    It keeps (1 - momentum)^batches of the old statistics, so the result depends on the batch size.
    """

    def keeps_variance_of_one_value(self) -> bool:
        """True: a call with a single value is skipped."""
        return True

    def attach(self) -> list[RemovableHandle]:
        """Registers hooks that put the layer into training mode during its forward."""
        after = self.layer.register_forward_hook(self._after, always_call=True)
        return [*super().attach(), after]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel() == 0:
            return
        self.compressed.merge(Moments.of(values))
        # One value has no variance and torch refuses to train on it, so it is normalized in eval mode.
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
