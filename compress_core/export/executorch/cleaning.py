"""Cleans graphs of `torch.export` before they are lowered: what does nothing, what is constant, what is unused."""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

_ATEN = torch.ops.aten


def drop_what_does_nothing(module: fx.GraphModule) -> None:
    """Removes copies and conversions to the type that a tensor has, and writes out what the partitioner looks for.

    Args:
        module: A graph with functional ATen operators; changed in place.
    """
    same_type = (_ATEN.to.dtype, _ATEN._to_copy.default)
    copies = (_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default, _ATEN.detach.default)
    for node in list(module.graph.nodes):
        if node.target in copies or (node.target in same_type and _has_type_of_its_source(node)):
            if node.args[0].op == "placeholder" and any(reader.op == "output" for reader in node.users):
                continue  # an output that is an input has to be a copy
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in (
            _ATEN.view.default,
            _ATEN._unsafe_view.default,
        ):  # which would need the layout that a removed copy made
            node.target = _ATEN.reshape.default
        elif node.target == _ATEN.max_pool2d.default and (len(node.args) < 3 or not node.args[2]):
            # The partitioner of ExecuTorch 1.4 fails on a pooling without an explicit stride.
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
        elif node.target == _ATEN.clamp.default and _ends_of(node) is not None:
            # The form that is fused with the operator before.
            node.target, node.args, node.kwargs = _ATEN.hardtanh.default, (node.args[0], *_ends_of(node)), {}
    module.graph.eliminate_dead_code()
    module.recompile()


def _has_type_of_its_source(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    given, made = source.meta.get("val"), node.meta.get("val")
    return given is not None and made is not None and given.dtype == made.dtype and given.device == made.device


def _ends_of(clamp: fx.Node) -> Any:
    low, high = (*clamp.args[1:3], None, None)[:2]
    low, high = clamp.kwargs.get("min", low), clamp.kwargs.get("max", high)
    is_float = clamp.meta["val"].dtype.is_floating_point
    both = all(isinstance(end, (int, float)) and math.isfinite(end) for end in (low, high))
    return (float(low), float(high)) if is_float and both else None  # type: ignore[arg-type]


def fold_constants(module: fx.GraphModule) -> None:
    """Computes what depends on constants only, except for dequantized weights, and forgets what is unused.

    Args:
        module: The graph; changed in place.
    """
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = _constant(module, str(node.target))
        elif node.op == "call_function" and _is_constant(node, values):
            with torch.no_grad():
                made = node.target(
                    *fx.map_arg(node.args, values.__getitem__), **fx.map_arg(node.kwargs, values.__getitem__)
                )
            values[node] = made
            if isinstance(made, torch.Tensor):
                name = f"constant_{len(values)}_{node.name}"
                module.register_buffer(name, made.detach().clone().contiguous())
                with module.graph.inserting_before(node):
                    replacement = module.graph.get_attr(name)
                values[replacement] = made
                node.replace_all_uses_with(replacement)
    module.graph.eliminate_dead_code()
    _forget_unused(module)
    module.recompile()


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    sources = node.all_input_nodes
    if not sources or not all(source in values for source in sources):
        return False
    if node.target is operator.getitem:
        return True
    return str(node.target).startswith("aten.") and "rand" not in str(node.target)


def _constant(module: nn.Module, name: str) -> Any:
    return reduce(getattr, name.split("."), module)


def _forget_unused(module: fx.GraphModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, owner in list(module.named_modules()):
        for store in (owner._parameters, owner._buffers):
            for key in list(store):
                if (f"{name}.{key}" if name else key) not in read:
                    del store[key]
