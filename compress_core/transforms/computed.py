"""`ComputedWeight`: what code outside of a forward gets when it reads the weight of a compressed layer.

The weight of a compressed layer is computed on each read, so a write to what was read would be lost: LoRA is merged by
`layer.weight.data += delta`, layers are initialized by `nn.init.normal_(layer.weight)`, frozen by
`layer.weight.requires_grad_(False)`. Here a write reaches the stored parameter, and what was read is computed again.
Reading gives the computed values; results of computations are ordinary tensors.

In a forward layers read ordinary tensors, because a subclass costs some microseconds in each operator. Only code that
mentions `data` gets this class there as well: adapters are merged and unmerged in forwards too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_core.errors import TransformError
from compress_core.torch_internals import (
    MODULE_CALL,
    PARAMETER_MARK,
    SubclassesDisabled,
    storage_identity,
    tree_map,
    version_of,
)

# These write no values through the tensor itself, but are meant for the parameter.
_OF_THE_PARAMETER = frozenset({"register_hook", "register_post_accumulate_grad_hook", "__setitem__"})
_SETTERS = frozenset({"data", "grad", "requires_grad"})
# Arguments of functions that write to a tensor which is not their first positional argument.
_WRITTEN_BY_NAME = ("out", "tensor", "input", "self")


def is_read_for_a_forward() -> bool:
    """Returns whether the code that reads a weight, the caller's caller, belongs to a forward and only reads."""
    reader = sys._getframe(2)
    if "data" in reader.f_code.co_names:
        return False
    frame: Any = reader
    while frame is not None:
        if frame.f_code is MODULE_CALL:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class _Source:
    """Where a computed weight comes from.

    Attributes:
        name: What it is, for messages.
        computed: The whole computed weight.
        stored: The stored parameter.
        compute: Maps the parameter to the computed weight.
    """

    name: str
    computed: torch.Tensor
    stored: torch.Tensor
    compute: Callable[[torch.Tensor], torch.Tensor]

    def renew(self) -> None:
        """Computes the values again, after a write to the parameter."""
        with torch.no_grad():
            values = self.compute(self.stored.detach())
            if values.shape == self.computed.shape:
                self.computed.detach().copy_(values)


class ComputedWeight(torch.Tensor):
    """The computed weight of a layer, or a view of it; a write to it is a write to the layer's parameter."""

    _source: _Source
    _target: torch.Tensor  # the same view of the parameter

    @classmethod
    def of(
        cls, name: str, computed: torch.Tensor, stored: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Returns the computed weight, connected with the parameter.

        Args:
            name: What it is, for messages.
            computed: The computed weight.
            stored: The parameter.
            compute: Maps the parameter to the computed weight.
        """
        return _connected(computed, stored, _Source(name, computed, stored, compute))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function on the computed values, or on the parameter if it writes to the weight."""
        kwargs = kwargs or {}
        with SubclassesDisabled():
            if _writes(func, args, kwargs):
                return _write(func, args, kwargs)
            return _read(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Returns an ordinary tensor."""
        values: torch.Tensor = _values(self)
        return values.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles an ordinary tensor."""
        return _values(self).detach().__reduce_ex__(protocol)

    def _become_parameter(self, mark: bool) -> None:
        """Makes this an ordinary parameter; `nn.Parameter(tensor)` marks the tensor of a subclass as one."""
        requires_grad = self._target.requires_grad
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.requires_grad_(requires_grad)


setattr(ComputedWeight, PARAMETER_MARK, property(lambda self: False, ComputedWeight._become_parameter))


def _connected(values: torch.Tensor, target: torch.Tensor, source: _Source) -> torch.Tensor:
    with SubclassesDisabled():
        weight = values.as_subclass(ComputedWeight)
    weight._source, weight._target = source, target
    return weight


def _values(leaf: Any) -> Any:
    with SubclassesDisabled():
        return leaf.as_subclass(torch.Tensor) if isinstance(leaf, ComputedWeight) else leaf


def _targets(leaf: Any) -> Any:
    return leaf._target if isinstance(leaf, ComputedWeight) else leaf


def _weights_in(structure: Any) -> Iterator[ComputedWeight]:
    if isinstance(structure, ComputedWeight):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from _weights_in(item)
    elif isinstance(structure, dict):
        yield from _weights_in(list(structure.values()))


def _has_weight(structure: Any) -> bool:
    return next(_weights_in(structure), None) is not None


def _name_of(func: Any) -> tuple[str, str]:
    """Returns the name of a function, and that of the attribute if it is a getter or setter."""
    return getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")


def _writes(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name, attribute = _name_of(func)
    if _has_weight(kwargs.get("out")):
        return True
    is_write = name in _OF_THE_PARAMETER or (name.endswith("_") and not name.endswith("__"))
    if not is_write and not (name == "__set__" and attribute in _SETTERS):
        return False
    return _has_weight(args[0] if args else [kwargs.get(key) for key in _WRITTEN_BY_NAME])


def _write(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    written = [*_weights_in(args[:1]), *_weights_in([kwargs.get(key) for key in _WRITTEN_BY_NAME])]
    others = args[1:]
    if _name_of(func) == ("__set__", "data") and isinstance(others[0], ComputedWeight):
        # `weight.data += delta` ends by setting `data` to what it has just written to.
        is_own = others[0]._source is written[0]._source
        others = (others[0]._target.detach() if is_own else others[0],)
    named = {key: tree_map(_targets if key in _WRITTEN_BY_NAME else _values, kwargs[key]) for key in kwargs}
    result = func(*tree_map(_targets, args[:1]), *tree_map(_values, others), **named)
    for source in {id(weight._source): weight._source for weight in written}.values():
        source.renew()
    if isinstance(result, nn.Parameter):
        return result  # `layer.weight += delta` assigns what it gets to the layer
    return next((weight for weight in written if result is weight._target), result)


def _versions(weights: list[ComputedWeight]) -> list[int]:
    # Views share the version of their tensor, but `data` has its own.
    return [0 if weight.is_inference() else version_of(weight) for weight in weights]


def _read(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, attribute = _name_of(func)
    weights = list(_weights_in([args, kwargs]))
    if (name, attribute) == ("__get__", "grad"):
        return func(weights[0]._target)
    before = _versions(weights)
    given, named = tree_map(_values, (args, kwargs))
    result = func(*given, **named)
    if before != _versions(weights):
        raise TransformError(
            f"{name} writes to {weights[0]._source.name}, which is computed from the stored parameter, so the write "
            "would be lost; write with methods of the tensor itself, such as copy_ and add_, or to "
            "compress_core.transforms.raw_parameter(layer, name)"
        )
    if isinstance(result, np.ndarray):
        result.setflags(write=False)  # a write to it would be lost as well
    if not args or not isinstance(args[0], ComputedWeight) or name == "as_subclass":
        return result
    return args[0] if result is given[0] else _with_views(args[0], result, func, args, kwargs)


def _with_views(weight: ComputedWeight, result: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Connects results that are views of the weight with the same views of the parameter."""
    several = isinstance(result, (list, tuple))
    results = list(result) if several else [result]
    memory = storage_identity(weight._source.computed)
    if not any(_shares(item, memory) for item in results):
        return result
    with torch.no_grad():
        made = func(weight._target, *tree_map(_targets, args[1:]), **tree_map(_targets, kwargs))
    targets = list(made) if several else [made]
    pairs = zip(results, targets, strict=True)
    views = [_connected(item, t, weight._source) if _shares(item, memory) else item for item, t in pairs]
    return type(result)(views) if several else views[0]


def _shares(item: Any, memory: int) -> bool:
    return isinstance(item, torch.Tensor) and item.layout == torch.strided and storage_identity(item) == memory
