"""Products of a layer's input with its weight: how they are called, and how they read as a matrix product.

A weight is a stack of matrices of shape (groups, rows, columns): a row makes one output channel, a column belongs to
one input (of one position of the kernel). The inputs of a call are rows of numbers of shape (groups, positions,
columns), its outputs of shape (groups, positions, rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

Kind = Literal["conv", "transposed", "linear"]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LINEAR = ("input", "weight", "bias")
_PRODUCT = ("input", "other")

# Function -> kind, names of its arguments in order, whether it takes (columns, rows) instead of (rows, columns).
_FUNCTIONS: dict[Any, tuple[Kind, tuple[str, ...], bool]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), ("conv", _CONV, False)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("transposed", _TRANSPOSED, False)),
    F.linear: ("linear", _LINEAR, False),
    torch.matmul: ("linear", _PRODUCT, True),
    torch.mm: ("linear", _PRODUCT, True),
    torch.Tensor.matmul: ("linear", _PRODUCT, True),
    torch.Tensor.mm: ("linear", _PRODUCT, True),
    torch.Tensor.__matmul__: ("linear", _PRODUCT, True),
    torch.addmm: ("linear", ("bias", "input", "other"), True),
}


@dataclass(frozen=True)
class Product:
    """A call of a function that multiplies an input by a weight.

    Attributes:
        kind: How the weight is applied.
        takes_columns_first: Whether the function takes its matrix as (columns, rows).
        arguments: The arguments of the call by name; the weight is `weight` or `other`.
    """

    kind: Kind
    takes_columns_first: bool
    arguments: dict[str, Any]

    @property
    def weight_argument(self) -> str:
        """The name of the argument that is the weight."""
        return "other" if "other" in self.arguments else "weight"

    @property
    def groups(self) -> int:
        """Number of groups of a convolution."""
        return int(self.arguments.get("groups", 1))


def product_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Product | None:
    """Returns how a call multiplies by a weight; None if it is not known to do so."""
    if func not in _FUNCTIONS:
        return None
    kind, names, columns_first = _FUNCTIONS[func]
    if len(args) > len(names) or kwargs.keys() - set(names):
        return None  # beta, alpha, out
    return Product(kind, columns_first, {**dict(zip(names, args, strict=False)), **kwargs})


def as_matrices(weight: torch.Tensor, kind: Kind, groups: int, *, columns_first: bool = False) -> torch.Tensor:
    """Returns a weight as (groups, rows, columns), a view where that is possible.

    Args:
        weight: Values in the shape of the parameter.
        kind: How the weight is applied.
        groups: Number of groups.
        columns_first: Whether a linear parameter is stored as (columns, rows).
    """
    if kind == "linear":
        return (weight.t() if columns_first else weight).unsqueeze(0)
    if kind == "conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    inputs, outputs = weight.shape[:2]
    return weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2).reshape(groups, outputs, -1)


def as_weight(matrices: torch.Tensor, shape: torch.Size, kind: Kind, *, columns_first: bool = False) -> torch.Tensor:
    """Returns matrices in the shape of the parameter: the inverse of `as_matrices`."""
    if kind == "linear":
        matrix = matrices.squeeze(0)
        return matrix.t() if columns_first else matrix
    if kind == "conv":
        return matrices.reshape(shape)
    groups, outputs, _ = matrices.shape
    split = matrices.reshape(groups, outputs, shape[0] // groups, math.prod(shape[2:]))
    return split.transpose(1, 2).reshape(shape)


def input_rows(product: Product, chosen: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Returns the inputs that make some of a call's outputs; shape (groups, positions, columns), float32 or float64.

    Args:
        product: The call.
        chosen: Indices of positions of each sample's output, flat; shape (samples, positions).
        sizes: Spatial sizes of the output; for linear layers the number of positions.
    """
    values = product.arguments["input"]
    if product.kind == "linear":
        return wide(_taken(values.reshape(len(chosen), -1, values.shape[-1]), chosen)).unsqueeze(0)
    kernel = product.arguments["weight"].shape[2:]
    values = values if values.ndim == len(kernel) + 2 else values.unsqueeze(0)
    index, is_inside = _patches(product, chosen, sizes, values.shape[2:], kernel)
    samples, channels = values.shape[:2]
    flat = values.flatten(2)
    found = flat.gather(2, index.view(samples, 1, -1).expand(-1, channels, -1)).view(
        samples, channels, *index.shape[1:]
    )
    found = wide(found) * is_inside.unsqueeze(1)
    groups = product.groups
    by_group = found.view(samples, groups, channels // groups, *index.shape[1:]).permute(1, 0, 3, 2, 4)
    return by_group.reshape(groups, samples * index.shape[1], -1)


def output_rows(output: torch.Tensor, kind: Kind, dims: int, groups: int, chosen: torch.Tensor) -> torch.Tensor:
    """Returns some of a call's outputs; shape (groups, positions, rows), float32 or float64.

    Args:
        output: What the call returned.
        kind: How the weight is applied.
        dims: Number of spatial dimensions.
        groups: Number of groups.
        chosen: See `input_rows`.
    """
    if kind == "linear":
        return wide(_taken(output.reshape(len(chosen), -1, output.shape[-1]), chosen)).unsqueeze(0)
    batched = output if output.ndim == dims + 2 else output.unsqueeze(0)
    samples, channels = batched.shape[:2]
    found = batched.flatten(2).gather(2, chosen.unsqueeze(1).expand(-1, channels, -1))
    by_group = wide(found).view(samples, groups, channels // groups, -1).permute(1, 0, 3, 2)
    return by_group.reshape(groups, chosen.numel(), -1)


def targets_without_bias(product: Product, output: torch.Tensor, dims: int, chosen: torch.Tensor) -> torch.Tensor:
    """Returns what the weight alone has added to some of a call's outputs, in the shape of `output_rows`."""
    bias = product.arguments.get("bias")
    if product.kind == "linear":
        # The first argument of addmm may have any shape.
        plain = output if bias is None else wide(output) - wide(bias.detach())
        return output_rows(plain, product.kind, dims, 1, chosen)
    targets = output_rows(output, product.kind, dims, product.groups, chosen)
    return targets if bias is None else targets - wide(bias.detach()).reshape(product.groups, 1, -1)


def output_sizes(output: torch.Tensor, kind: Kind, dims: int) -> tuple[int, tuple[int, ...]]:
    """Returns the number of samples of an output and the sizes of the positions of each sample."""
    if kind == "linear":
        samples = output.shape[0] if output.ndim > 1 else 1
        return samples, (output.numel() // max(samples * output.shape[-1], 1),)
    batched = output if output.ndim == dims + 2 else output.unsqueeze(0)
    return batched.shape[0], tuple(batched.shape[2:])


def wide(values: torch.Tensor) -> torch.Tensor:
    """Returns values in float32, or float64 if they are so already."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _taken(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    if chosen.shape[1] == rows.shape[1]:
        return rows.reshape(-1, rows.shape[-1])
    return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1])).reshape(-1, rows.shape[-1])


def _patches(
    product: Product,
    chosen: torch.Tensor,
    sizes: Sequence[int],
    inputs: Sequence[int],
    kernel: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the flat index of every input of every chosen output, and whether it is inside (not padding)."""
    dims = len(kernel)
    stride, dilation = (_per_dim(product.arguments.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = _padding(product.arguments.get("padding", 0), kernel, dilation)
    flat = chosen.new_zeros((*chosen.shape, 1))
    inside = torch.ones_like(flat, dtype=torch.bool)
    rest = chosen
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(rest % size)
        rest = rest // size
    for dim, output in enumerate(reversed(coordinates)):
        offsets = torch.arange(kernel[dim], device=chosen.device) * dilation[dim]
        if product.kind == "conv":
            position = output.unsqueeze(-1) * stride[dim] - padding[dim] + offsets
            is_inside = torch.ones_like(position, dtype=torch.bool)
        else:
            scaled = output.unsqueeze(-1) + padding[dim] - offsets
            position, is_inside = scaled // stride[dim], scaled % stride[dim] == 0
        is_inside &= (position >= 0) & (position < inputs[dim])
        position = position.clamp(0, inputs[dim] - 1)
        flat = (flat.unsqueeze(-1) * inputs[dim] + position.unsqueeze(-2)).flatten(2)
        inside = (inside.unsqueeze(-1) & is_inside.unsqueeze(-2)).flatten(2)
    return flat, inside


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (int(value),)
    return values * dims if len(values) == 1 else values


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    if value == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return (0,) * len(kernel) if value == "valid" else _per_dim(value, len(kernel))
