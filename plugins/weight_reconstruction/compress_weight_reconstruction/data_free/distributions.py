"""Means and variances of activations, channel by channel, and how common functions change them.

A batch norm says what its output was on the training data: its bias is the mean, its weight the standard deviation.
Behind it, values are taken as normally distributed, which makes the moments behind an activation function integrals in
one variable (as in Nagel et al. 2019, arXiv:1906.04721, section 4.2, who do it for ReLU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

# Functions of each element alone that are integrated.
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
        *(F.hardswish, F.hardsigmoid, F.tanh, F.sigmoid, F.softsign, F.logsigmoid),
        *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.square),
        *(torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, torch.Tensor.sigmoid, torch.Tensor.tanh),
        *(torch.Tensor.clamp, torch.Tensor.clamp_min, torch.Tensor.abs, torch.Tensor.square),
    }
)
_IDENTITIES: frozenset[Any] = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
    | {torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, torch.Tensor.detach, torch.Tensor.to}
)
_AVERAGES: frozenset[Any] = frozenset(
    {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
)
_MEANS: frozenset[Any] = frozenset({torch.mean, torch.Tensor.mean})
_SHAPES: frozenset[Any] = frozenset(
    {torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape}
    | {torch.squeeze, torch.Tensor.squeeze}
)
_SUMS: frozenset[Any] = frozenset(
    {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__}
)
# Nodes of the trapezoidal rule from -6 to 6 standard deviations.
_NODES, _REACH = 769, 6.0


@dataclass(frozen=True)
class Distribution:
    """What is known of a tensor's values.

    Attributes:
        mean: Mean of each channel over samples and positions, float64, shape (channels,).
        variance: Their variances.
        dim: Dimension of the channels.
        is_normal: Whether values are about normally distributed.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    dim: int
    is_normal: bool = True


def after(
    func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[Distribution | None], result: torch.Tensor
) -> Distribution | None:
    """Returns the distribution of what a call has returned; None if it is not known.

    Args:
        func: A function that is no product and no batch norm.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: The distributions of the tensors among its arguments, in order.
        result: What it has returned.
    """
    known = [one for one in given if one is not None]
    if not known or len(known) < len(given):
        return None
    if func in _SUMS:
        return _sum(args, kwargs, known)
    return _of_one(func, args, kwargs, known[0], result) if len(known) == 1 else None


def _of_one(
    func: Any, args: Any, kwargs: dict[str, Any], given: Distribution, result: torch.Tensor
) -> Distribution | None:
    if func in _ELEMENTWISE and given.is_normal:
        return _integrated(func, args[1:], kwargs, given)
    if func in _AVERAGES:
        # Neighbours are taken as equal: the variance is an upper bound.
        return replace(given, is_normal=False)
    if func in _MEANS:
        return _averaged(args, kwargs, given)
    if func in _SHAPES:
        return _reshaped(args[0], given, result)
    return given if func in _IDENTITIES else None


def _sum(args: Any, kwargs: dict[str, Any], given: Sequence[Distribution]) -> Distribution | None:
    if kwargs:
        return None
    if len(given) == 1:
        number = next((arg for arg in args if not isinstance(arg, torch.Tensor)), None)
        return replace(given[0], mean=given[0].mean + number) if isinstance(number, (int, float)) else None
    one, other = given
    if one.dim != other.dim or one.mean.shape != other.mean.shape or args[0].shape != args[1].shape:
        return None
    return Distribution(one.mean + other.mean, one.variance + other.variance, one.dim)


def _integrated(func: Any, rest: Any, kwargs: dict[str, Any], given: Distribution) -> Distribution:
    nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64, device=given.mean.device)
    density = torch.exp(-nodes.square() / 2) * (2 * _REACH / (_NODES - 1) / math.sqrt(2 * math.pi))
    density = density / density.sum()
    values = func(given.mean[:, None] + given.variance.sqrt()[:, None] * nodes, *rest, **kwargs)
    mean = values @ density
    variance = (values - mean[:, None]).square() @ density
    return Distribution(mean, variance, given.dim, is_normal=False)


def _averaged(args: Any, kwargs: dict[str, Any], given: Distribution) -> Distribution | None:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    keeps = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    if dims is None or kwargs.keys() - {"dim", "keepdim"}:
        return None
    ndim = args[0].ndim
    gone = {dim % ndim for dim in ((dims,) if isinstance(dims, int) else dims)}
    if given.dim in gone or 0 in gone:
        return None
    dim = given.dim if keeps else given.dim - sum(one < given.dim for one in gone)
    return replace(given, dim=dim, is_normal=False)


def _reshaped(before: torch.Tensor, given: Distribution, result: torch.Tensor) -> Distribution | None:
    """Flattening makes a column of each position of a channel; other changes of shape are not followed."""
    if result.ndim < 2 or given.dim != 1 or result.shape[0] != before.shape[0]:
        return None
    channels = len(given.mean)
    if result.shape[1] == channels:
        return given
    if result.ndim != 2 or result.shape[1] % channels:
        return None
    times = result.shape[1] // channels
    mean, variance = given.mean.repeat_interleave(times), given.variance.repeat_interleave(times)
    return replace(given, mean=mean, variance=variance)
