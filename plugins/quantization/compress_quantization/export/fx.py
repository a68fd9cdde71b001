"""Reads and edits graphs of `torch.export` with quantize and dequantize operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import fx

_FLOAT32 = torch.finfo(torch.float32)


def _targets(*names: str) -> frozenset[Any]:
    operators = torch.ops.quantized_decomposed
    return frozenset(getattr(getattr(operators, name), "default") for name in names)  # noqa: B009 - a name of torch


def is_quantize(node: Any) -> bool:
    """Returns whether a node quantizes with one scale."""
    return isinstance(node, fx.Node) and node.target in _targets("quantize_per_tensor")


def is_dequantize(node: Any) -> bool:
    """Returns whether a node dequantizes an activation."""
    return (
        isinstance(node, fx.Node)
        and node.target in _targets("dequantize_per_tensor")
        and node.all_input_nodes[0].op != "get_attr"
    )


def grid_of(node: fx.Node) -> tuple[Any, ...]:
    """Returns the grid of a quantize or dequantize operator with one scale: its arguments but the first."""
    return node.args[1:]


def tensor_of(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """Returns the constant that a node reads, or None for other nodes."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = reduce(getattr, str(node.target).split("."), module)
    return found.detach() if isinstance(found, torch.Tensor) else None


def add_constant(module: fx.GraphModule, name: str, values: torch.Tensor, before: fx.Node) -> fx.Node:
    """Returns a node in front of another one that reads a new constant."""
    plain = name.replace(".", "_")
    unique, number = plain, 0
    while hasattr(module, unique):
        number += 1
        unique = f"{plain}_{number}"
    module.register_buffer(unique, values.clone().contiguous())
    with module.graph.inserting_before(before):
        return module.graph.get_attr(unique)


def call_like(module: fx.GraphModule, target: Any, args: Sequence[Any], like: fx.Node) -> fx.Node:
    """Returns a new node at the insertion point, which belongs to the module of another node."""
    node = module.graph.call_function(target, tuple(args))
    node.meta.update({key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta})
    return node


def place_behind(module: fx.GraphModule, node: fx.Node, value: fx.Node) -> None:
    """Moves a node right behind the node that it reads, which may be an input of the graph."""
    if value.op == "call_function":
        value.append(node)
        return
    inputs = [entry for entry in module.graph.nodes if entry.op == "placeholder"]
    ([*inputs, value] if value.op == "get_attr" else inputs)[-1].append(node)


@dataclass(frozen=True)
class IntegerWeight:
    """A weight of a graph that is stored as integers; its values are integers * scale.

    Attributes:
        integers: int8.
        scale: float32, shape () or (channels,).
        axis: Dimension of the channels; None for a single scale.
        name: Name of the integers in the graph.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    axis: int | None
    name: str

    @classmethod
    def behind(cls, module: fx.GraphModule, node: Any) -> IntegerWeight | None:
        """Returns the weight that a node dequantizes, or None for other nodes."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        if node.target not in _targets("dequantize_per_tensor", "dequantize_per_channel"):
            return None
        integers = tensor_of(module, node.args[0])
        if integers is None:
            return None
        name = str(node.all_input_nodes[0].target)
        if node.target in _targets("dequantize_per_tensor"):
            return cls(integers, torch.tensor(node.args[1], dtype=torch.float32), None, name)
        scale = tensor_of(module, node.args[1])
        assert scale is not None and isinstance(node.args[3], int)
        return cls(integers, scale, node.args[3], name)

    def values(self) -> torch.Tensor:
        """Returns the weight in float32."""
        return self.integers.float() * self._broadcast(self.scale)

    def insert(self, module: fx.GraphModule, before: fx.Node) -> fx.Node:
        """Returns a node in front of another one that dequantizes this weight."""
        operators = torch.ops.quantized_decomposed
        levels = (-128, 127, torch.int8)
        integers = add_constant(module, self.name, self.integers, before)
        if self.axis is None:
            with module.graph.inserting_before(before):
                target = operators.dequantize_per_tensor.default
                return call_like(module, target, (integers, float(self.scale), 0, *levels), before)
        scale = add_constant(module, f"{self.name}_scale", self.scale, before)
        zeros = torch.zeros_like(self.scale, dtype=torch.int64)
        zero_point = add_constant(module, f"{self.name}_zero_point", zeros, before)
        with module.graph.inserting_before(before):
            target = operators.dequantize_per_channel.default
            return call_like(module, target, (integers, scale, zero_point, self.axis, *levels), before)

    def scaled(self, factors: torch.Tensor, axis: int) -> IntegerWeight | None:
        """Returns the weight times a factor for each channel, exact except for the rounding of the scales.

        A negative factor mirrors the integers of a channel, a factor of zero makes them zero.

        Args:
            factors: float64, shape (channels,).
            axis: Dimension of the channels.

        Returns:
            None if the scales belong to another dimension, if a mirrored integer is out of range, or if a scale would
            become zero.
        """
        if self.axis not in (None, axis) or factors.shape != (self.integers.shape[axis],):
            return None
        scale = self.scale.double().expand(factors.shape)
        # A channel of zeros keeps its scale, because scales have to be positive.
        scales = torch.where(factors == 0, scale, scale * factors.abs()).float()
        if not bool(((scales >= _FLOAT32.tiny) & (scales <= _FLOAT32.max)).all()):
            return None
        made = replace(self, scale=scales, axis=axis)
        integers = self.integers.short() * made._broadcast(factors.sign().short())
        if integers.numel() and int(integers.max()) > torch.iinfo(torch.int8).max:
            return None  # -128 was mirrored
        return replace(made, integers=integers.to(torch.int8))

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        if self.axis is None:
            return values
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return values.reshape(shape)
