"""Finds the parameters that a model multiplies its activations with, in whatever module and under whatever name.

Layers of torch are known by their class. Layers of a user's own (the Conv1D of GPT-2, fused experts, `x @ self.weight`)
are known by what they compute: a parameter is a weight if it is an operand of a product whose other operand depends on
the model's inputs. On its way there it may be viewed, cut, joined with others and scaled; anything else that happens to
it is a reason not to compress it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from compress_core.trace.graph import Forwards, ForwardTrace, Operator, Ref, ValueId, is_in_weight_transform

# For each dimension of a value, the dimensions of a parameter that run along it.
Axes: TypeAlias = "tuple[frozenset[int], ...]"

_NOWHERE: frozenset[int] = frozenset()

# Product -> position of an operand -> its dimension with the output's channels, counted from the end.
_PRODUCTS: dict[str, dict[int, int | None]] = {
    **{name: {0: -2, 1: -1} for name in ("mm", "bmm", "matmul", "mv")},
    **{name: {1: -2, 2: -1} for name in ("addmm", "baddbmm", "addbmm", "addmv")},
    **{name: {0: None, 1: None} for name in ("dot", "vdot")},
    "_grouped_mm": {0: None, 1: -1},
    "linear": {1: -2},
    "convolution": {1: None},  # depends on its kind
    "embedding": {0: -2},
    "_embedding_bag": {0: -2},
    "_trilinear": {1: -3},
}
_ATTENTION = "scaled_dot_product"

# Operators that combine parameters with activations without summing over products of them. Any other operator that does
# so may be a product.
_NO_PRODUCTS = frozenset(
    ["cat", "stack", "copy", "index", "index_put", "index_add", "index_copy", "index_select", "index_fill", "gather"]
    + ["scatter", "scatter_add", "scatter_reduce", "slice_scatter", "select_scatter", "masked_fill", "masked_scatter"]
    + ["native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "batch_norm", "group_norm"]
    + ["_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "rms_norm"]
    + ["_fused_rms_norm", "layer_norm", "_prelu_kernel", "expand", "fill", "normal", "where", "put", "take"]
)

# Products with a position for the weight, in which it is one whatever the other operand depends on.
_LAYERS = frozenset({"linear", "convolution", "embedding", "_embedding_bag"})

_SAME = frozenset(
    ["detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh", "copy", "slice", "narrow", "split", "chunk"]
    + ["split_with_sizes", "unsafe_split", "flip", "roll", "neg", "positive", "index_select"]
)
_SCALED = frozenset({"mul", "div", "_weight_norm_interface", "_weight_norm"})
_RESHAPED = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze"}
)


@dataclass(frozen=True)
class WeightUse:
    """A parameter that is used as a weight.

    Attributes:
        name: Its dotted name.
        channel_dim: Its dimension with the output channels of all products; None if they disagree or have none.
        operator: What kind of layer uses it: `linear`, `conv2d`, `conv_transpose1d`, `embedding` and so on.
        obstacle: Why no transform of the parameter is a transform of what is multiplied; empty if it is.
    """

    name: str
    channel_dim: int | None
    operator: str
    obstacle: str = ""


@dataclass(frozen=True)
class _Origin:
    """How a value was made from one parameter.

    Attributes:
        axes: Where its dimensions come from.
        changed: What was done to it that is no view and no scaling; empty if nothing was.
        transformed: Whether it has passed the weight transforms of its module.
    """

    axes: Axes
    changed: str = ""
    transformed: bool = False


_Origins: TypeAlias = "dict[str, _Origin]"


@dataclass
class Weights:
    """The weights of a traced model.

    Attributes:
        uses: Name of a parameter -> how it is used; only parameters that are weights.
        values: For each forward in eval mode, the values that are made from parameters by views and transforms, with
            the names of these parameters.
    """

    uses: dict[str, WeightUse] = field(default_factory=dict)
    values: list[dict[ValueId, frozenset[str]]] = field(default_factory=list)


def find_weights(trace: Forwards, *, probed: Iterable[str] = ()) -> Weights:
    """Finds the parameters of a traced model that are used as weights.

    Args:
        trace: The trace.
        probed: Names of parameters that had a weight transform when the model was traced. One of these that reaches a
            product without it is read in a way that transforms cannot see.
    """
    found = Weights()
    asked = frozenset(probed)
    for forward in [*trace.forwards, *(forward for forward in trace.training if forward is not None)]:
        search = _Search(forward, asked)
        search.run()
        for use in search.uses:
            known = found.uses.get(use.name)
            found.uses[use.name] = use if known is None else _merged(known, use)
        if len(found.values) < len(trace.forwards):
            found.values.append(
                {
                    value: frozenset(name for name, origin in origins.items() if not origin.changed)
                    for value, origins in search.origins.items()
                }
            )
    return found


def _merged(first: WeightUse, second: WeightUse) -> WeightUse:
    dim = first.channel_dim if first.channel_dim == second.channel_dim else None
    return replace(first, channel_dim=dim, obstacle=first.obstacle or second.obstacle)


class _Search:
    """Follows the parameters through one forward."""

    def __init__(self, forward: ForwardTrace, probed: frozenset[str]) -> None:
        self._forward, self._probed = forward, probed
        self._activations = {value.index for value in forward.inputs}
        self.uses: list[WeightUse] = []
        self.origins: dict[ValueId, _Origins] = {
            value.index: {value.parameter: _Origin(tuple(frozenset({dim}) for dim in range(len(value.shape))))}
            for value in forward.values
            if value.parameter and value.dtype.is_floating_point
        }

    def run(self) -> None:
        for operator in self._forward.operators:
            base = operator.name.split(".")[1].rstrip("_") or operator.name.split(".")[1]
            self._note_writes(operator)
            self._note_uses(operator, base)
            results = [*(value for _, value in operator.outputs), *operator.overwritten]
            chosen = base in ("index", "index_select", "gather") and self._origin_of(operator, 0)
            if self._activations.isdisjoint(operator.inputs) or (
                chosen and self._data(operator) not in self._activations
            ):
                made = self._propagated(operator, base)
                self.origins.update({value: made(value) for value in results})
            else:
                self._activations.update(results)
                for value in results:
                    self.origins.pop(value, None)

    def _data(self, operator: Operator) -> ValueId | None:
        first = operator.arguments[0] if operator.arguments else None
        return first.value if isinstance(first, Ref) else None

    def _origin_of(self, operator: Operator, position: int) -> _Origins:
        argument = operator.arguments[position] if position < len(operator.arguments) else None
        return self.origins.get(argument.value, {}) if isinstance(argument, Ref) else {}

    def _note_writes(self, operator: Operator) -> None:
        values = self._forward.values
        for value in [*(value for _, value in operator.outputs), *operator.overwritten]:
            before = values[value].before
            name = "" if before is None else values[before].parameter
            if name and before in self.origins:
                self.uses.append(WeightUse(name, None, "linear", "the forward writes to it"))

    # Products.

    def _note_uses(self, operator: Operator, base: str) -> None:
        if base.startswith(_ATTENTION) or base.startswith(f"_{_ATTENTION}"):
            operands: dict[int, int | None] = {0: None, 1: None, 2: None}
        else:
            operands = _PRODUCTS.get(base, {})
            if base not in _PRODUCTS:
                self._note_unknown(operator, base)
        is_layer = base in _LAYERS or self._call_of(operator) in _LAYERS
        for position, output in operands.items():
            others = [operator.arguments[other] for other in operands if other != position]
            meets_input = any(isinstance(o, Ref) and o.value in self._activations for o in others)
            of_parameters = any(isinstance(o, Ref) and self.origins.get(o.value) for o in others)
            if of_parameters and not is_layer and not meets_input:
                continue  # a product of parameters, which may be a weight later
            kind, dim = _kind(operator, base), output
            if base == "convolution":
                dim = 1 if operator.arguments[6] else 0
            for name, origin in self._origin_of(operator, position).items():
                self.uses.append(self._use(name, origin, kind, dim))

    def _note_unknown(self, operator: Operator, base: str) -> None:
        if base in _NO_PRODUCTS or torch.Tag.pointwise in getattr(operator.function, "tags", ()):
            return
        if self._activations.isdisjoint(operator.inputs) or is_in_weight_transform(operator.module):
            return
        why = f"it enters '{operator.name}', of which is not known whether and how it multiplies with it"
        for value in operator.inputs:
            for name in self.origins.get(value, {}):
                self.uses.append(WeightUse(name, None, "linear", why))

    def _call_of(self, operator: Operator) -> str:
        return "" if operator.call is None else self._forward.calls[operator.call].function.rpartition(".")[2]

    def _use(self, name: str, origin: _Origin, kind: str, dim: int | None) -> WeightUse:
        if name in self._probed and not origin.transformed:
            obstacle = "the forward does not read it as an attribute of its module, so no transform can reach it"
        elif origin.changed:
            obstacle = (
                f"the forward computes a weight from it ({origin.changed}), which transforms of it would not hold for"
            )
        else:
            obstacle = ""
        axes = origin.axes[dim] if dim is not None and origin.axes else _NOWHERE
        return WeightUse(name, next(iter(axes)) if len(axes) == 1 else None, kind, obstacle)

    # Everything else.

    def _propagated(self, operator: Operator, base: str) -> Callable[[ValueId], _Origins]:
        shapes = [value.shape for value in self._forward.values]

        def made(value: ValueId) -> _Origins:
            found: _Origins = {}
            for source in dict.fromkeys(operator.inputs):
                if base in _SCALED and math.prod(shapes[source]) < math.prod(shapes[value]):
                    continue  # a factor for each channel is no weight
                for name, origin in self.origins.get(source, {}).items():
                    step = _moved(operator, base, origin, shapes[source], shapes[value])
                    found[name] = (
                        step if name not in found else replace(step, changed=found[name].changed or step.changed)
                    )
            return found

        return made


def _moved(operator: Operator, base: str, origin: _Origin, old: tuple[int, ...], new: tuple[int, ...]) -> _Origin:
    """Returns the origin of a result, from that of an argument."""
    if is_in_weight_transform(operator.module):
        return replace(origin, axes=_aligned(origin.axes, old, new), transformed=True)
    if base in _SAME or base in ("index", "gather"):
        axes = _indexed(operator, origin.axes, new) if base in ("index", "gather") else origin.axes
        return replace(origin, axes=axes if len(axes) == len(new) else (_NOWHERE,) * len(new))
    if base in _SCALED or base in ("expand", "cat", "repeat"):
        return replace(origin, axes=_aligned(origin.axes, old, new))
    if base in _RESHAPED:
        return replace(origin, axes=_reshaped(origin.axes, old, new))
    permuted = _permuted(operator, base, origin.axes)
    if permuted is not None:
        return replace(origin, axes=permuted)
    return replace(origin, axes=(_NOWHERE,) * len(new), changed=origin.changed or base)


def _aligned(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """Broadcasts: dimensions correspond from the last one on."""
    if len(new) < len(axes):
        return (_NOWHERE,) * len(new)
    return (*(_NOWHERE,) * (len(new) - len(axes)), *axes)


def _indexed(operator: Operator, axes: Axes, new: tuple[int, ...]) -> Axes:
    chosen = operator.arguments[1]
    if isinstance(chosen, int):
        return axes
    places = [dim for dim, entry in enumerate(chosen) if entry is not None]
    added = len(new) - (len(axes) - len(places))
    rest = [entry for dim, entry in enumerate(axes) if dim not in places]
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return (*rest[:at], *(_NOWHERE,) * added, *rest[at:])


def _permuted(operator: Operator, base: str, axes: Axes) -> Axes | None:
    arguments = operator.arguments[1:]
    if base in ("t", "numpy_T", "adjoint"):
        return axes[::-1]
    if base == "permute":
        return tuple(axes[int(dim)] for dim in arguments[0])
    if base in ("transpose", "swapaxes"):
        order = list(axes)
        first, second = int(arguments[0]), int(arguments[1])
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    if base in ("select", "unbind"):
        dim = int(arguments[0] if arguments else operator.keywords.get("dim", 0)) % len(axes)
        return (*axes[:dim], *axes[dim + 1 :])
    if base == "stack":
        dim = int(arguments[0] if arguments else operator.keywords.get("dim", 0)) % (len(axes) + 1)
        return (*axes[:dim], _NOWHERE, *axes[dim:])
    return None


def _reshaped(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """Gives each new dimension the axes of the old ones that have the same elements."""
    result: list[frozenset[int]] = [_NOWHERE] * len(new)
    for before, after in _runs(old, new):
        held = frozenset().union(*(axes[dim] for dim in before if old[dim] > 1))
        for dim in after:
            if new[dim] > 1:
                result[dim] = held
    return tuple(result)


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the shortest runs of dimensions with the same number of elements."""
    left = right = 0
    while left < len(old) and right < len(new):
        before, after, sizes = [left], [right], [old[left], new[right]]
        left, right = left + 1, right + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1] and left < len(old):
                before.append(left)
                sizes[0] *= old[left]
                left += 1
            elif right < len(new):
                after.append(right)
                sizes[1] *= new[right]
                right += 1
            else:
                break
        yield before, after


def _kind(operator: Operator, base: str) -> str:
    if base == "convolution":
        stride, transposed = operator.arguments[3], operator.arguments[6]
        return f"conv{'_transpose' if transposed else ''}{len(stride)}d"
    return "embedding" if "embedding" in base else "linear"
