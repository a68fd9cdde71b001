"""What a product does to means and variances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compress_weight_reconstruction.data_free.distributions import Distribution
from compress_weight_reconstruction.interception import Use, WeightCall


@dataclass(frozen=True)
class Geometry:
    """How a weight is applied.

    Attributes:
        use: How it enters its product.
        strides: Stride of a convolution in each dimension; empty for others.
        dilations: Likewise.
    """

    use: Use
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, call: WeightCall) -> Geometry:
        """Returns the geometry of a call."""
        arguments = call.product.arguments
        dims = arguments[call.product.weight_argument].ndim - 2

        def per_dim(name: str) -> tuple[int, ...]:
            value = arguments.get(name, 1)
            values = tuple(value) if isinstance(value, (tuple, list)) else (int(value),)
            return values * dims if len(values) == 1 else values

        return cls(call.use, per_dim("stride"), per_dim("dilation"))


def output_moments(
    weight: torch.Tensor, given: Distribution, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns mean and variance of what a weight makes of its inputs, each of shape (outputs,); None if not known.

    Inputs are taken as independent of one another, and padding as good as any input.

    Args:
        weight: The weight in the shape of its parameter, float64.
        given: The distribution of the input.
        geometry: How it is applied.
    """
    mean, variance = (_by_element(values, given, weight, geometry.use) for values in (given.mean, given.variance))
    if mean is None or variance is None:
        return None
    sums = [_by_output(values, geometry) for values in (weight * mean, weight.square() * variance)]
    # Outputs of a transposed convolution see other positions of the kernel, one set in each phase of the stride.
    return sums[0].mean(1), sums[1].mean(1) + sums[0].var(1, correction=0)


def output_of(call: WeightCall, given: Distribution, weight: torch.Tensor) -> Distribution | None:
    """Returns the distribution of a product's output, with the bias.

    Args:
        call: The product.
        given: The distribution of its input.
        weight: The weight in the shape of its parameter.
    """
    found = output_moments(weight.detach().double(), given, Geometry.of(call))
    bias = call.product.arguments.get("bias")
    if found is None or (bias is not None and bias.ndim != 1):
        return None
    mean, variance = found
    # Where a linear layer has its inputs, it has its outputs.
    return Distribution(mean if bias is None else mean + bias.detach().double(), variance, given.dim)


def _by_element(values: torch.Tensor, given: Distribution, weight: torch.Tensor, use: Use) -> torch.Tensor | None:
    """Returns the value of the input that each element of a weight is multiplied with; None if that is not known."""
    ones = [1] * (weight.ndim - 2)
    if use.kind == "linear":
        inputs = weight.shape[0] if use.columns_first else weight.shape[1]
        return None if len(values) != inputs else (values[:, None] if use.columns_first else values).expand_as(weight)
    if given.dim != 1:
        return None
    if use.kind == "transposed":
        return values.view(-1, 1, *ones).expand_as(weight) if len(values) == weight.shape[0] else None
    if len(values) != use.groups * weight.shape[1]:
        return None
    by_group = values.view(use.groups, 1, -1, *ones)
    return by_group.expand(use.groups, weight.shape[0] // use.groups, *weight.shape[1:]).reshape(weight.shape)


def _by_output(values: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Returns the sums of values in the shape of a weight over all inputs of an output, shape (outputs, phases)."""
    use = geometry.use
    if use.kind != "transposed":
        return use.as_matrices(values).sum(2).reshape(-1, 1)
    inputs, outputs = values.shape[:2]
    sums = values.reshape(use.groups, inputs // use.groups, outputs, -1).sum(1).flatten(0, 1)
    phase = torch.zeros(1, dtype=torch.int64, device=values.device)
    for size, stride, dilation in zip(values.shape[2:], geometry.strides, geometry.dilations, strict=True):
        own = torch.arange(size, device=values.device) * dilation % stride
        phase = (phase[:, None] * stride + own).flatten()
    return sums.new_zeros(len(sums), math.prod(geometry.strides)).index_add_(1, phase, sums)
