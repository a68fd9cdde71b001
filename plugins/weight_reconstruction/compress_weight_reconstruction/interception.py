"""Sees each call in a forward that multiplies by a weight, and lets the forward pause there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from compress_core.torch_internals import storage_identity
from compress_core.transforms.attention import inside_of
from compress_core.transforms.model_wide import transformed_weights
from compress_core.transforms.user_hooks import hook_is_running
from compress_weight_reconstruction.held_memory import HeldMemory
from compress_weight_reconstruction.marks import Marks, first_names, tensors_in
from compress_weight_reconstruction.products import Kind, Product, as_matrices, as_weight, product_of
from compress_weight_reconstruction.sums import Sums


@dataclass(frozen=True)
class Use:
    """How a weight enters a product.

    Attributes:
        kind: How it is applied.
        groups: Number of groups.
        columns_first: Whether the parameter as it is stored is (columns, rows).
        bias: Dotted name of the parameter that is added; empty if there is none, or if it is not a parameter.
        rows: First and last row + 1 of the part of the parameter (and of the bias) that enters; None for the whole.
    """

    kind: Kind
    groups: int
    columns_first: bool
    bias: str
    rows: tuple[int, int] | None = None

    def as_matrices(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values in the shape of the parameter, or of the part, as (groups, rows, columns)."""
        return as_matrices(values, self.kind, self.groups, columns_first=self.columns_first)

    def as_weight(self, matrices: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Returns matrices in the shape of the parameter, or of the part: the inverse of `as_matrices`."""
        return as_weight(matrices, shape, self.kind, columns_first=self.columns_first)


@dataclass(frozen=True)
class WeightCall:
    """A product as a forward reaches it.

    Attributes:
        name: Dotted name of the weight, with the rows in brackets if only a part of it enters.
        use: How the weight enters.
        product: The call with its arguments.
        output: What the call returned; None before the call.
        shortcut: What will be added to the output, directly or behind a batch norm, if that is known already.
    """

    name: str
    use: Use
    product: Product
    output: torch.Tensor | None = None
    shortcut: torch.Tensor | None = None


@dataclass
class Seen:
    """What a forward does with weights.

    Attributes:
        calls: Name of a weight -> its products, in order.
        others: Name of a weight -> the functions that use it in another way, in order.
        readers: Name of a weight -> number of calls that have read the output of one of its products.
    """

    calls: dict[str, list[Use]] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)

    def parts(self, name: str) -> list[str]:
        """Returns the names with which a weight occurs in `calls`: its own, or those of its parts."""
        return [part for part in self.calls if part == name or part.startswith(f"{name}[")]


class Weights:
    """Tells which tensors in a forward are weights of the model.

    Args:
        model: A model whose forwards this is for; computed weights are noted as its layers read them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, list[tuple[weakref.ref[torch.Tensor], str]]] = {}
        names = first_names(model)
        self._chains = {names[id(weight.parameter)]: weight for weight in transformed_weights(model)}
        for name, weight in self._chains.items():
            weight.chain.register_forward_hook(self._noting(name))
        for parameter in model.parameters():
            name = names.get(id(parameter), "")
            if name and name not in self._chains:
                self._note(parameter, name)

    def computed(self, name: str, like: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
        """Returns a weight as the forward would read it now, transposed if `like` is.

        Args:
            name: Its name.
            like: What the forward has read before; returned itself if the weight has no transforms.
            rows: See `Use`.
        """
        if name not in self._chains:
            return like
        value: torch.Tensor = self._chains[name].chain(self._chains[name].parameter)
        if rows is not None:
            return value[slice(*rows)]
        return value if value.shape == like.shape and value.stride() == like.stride() else value.t()

    def found(self, tensor: Any) -> tuple[str, torch.Tensor] | None:
        """Returns the name of the weight that a tensor is, or is a part or a view of, and the whole weight."""
        if not isinstance(tensor, torch.Tensor):
            return None
        try:
            entries = self._known.get(storage_identity(tensor), ())
        except (RuntimeError, NotImplementedError):
            return None
        live = [(name, whole) for reference, name in entries if (whole := reference()) is not None]
        exact = [entry for entry in live if entry[1].data_ptr() == tensor.data_ptr()]
        return next(iter([*exact, *live]), None)

    def _noting(self, name: str) -> Callable[..., None]:
        def note(chain: nn.Module, args: Any, result: torch.Tensor) -> None:
            self._note(result, name)

        return note

    def _note(self, tensor: torch.Tensor, name: str) -> None:
        try:
            identity = storage_identity(tensor)
        except (RuntimeError, NotImplementedError):
            return
        others = [entry for entry in self._known.get(identity, ()) if entry[0]() is not None and entry[1] != name]
        self._known[identity] = [*others, (weakref.ref(tensor), name)]


class Interceptor(TorchFunctionMode):
    """Calls a function at each product with a weight.

    Args:
        weights: The weights of the model.
        wanted: Names of the weights that matter.
        reached: Called with each product of these.
        before: Whether it is called before the product; the weight and the bias are then read again, as they may have
            been changed. Otherwise it is called after it.
        shortcuts: See `Sums`.
    """

    def __init__(
        self,
        weights: Weights,
        wanted: Set[str],
        reached: Callable[[WeightCall], None],
        *,
        before: bool,
        shortcuts: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.sums = Sums(shortcuts)
        self._weights, self._wanted, self._reached, self._before = weights, wanted, reached, before
        self.seen = Seen()
        self.held = HeldMemory()
        # The name of the weight whose product has returned a tensor.
        self._outputs = Marks[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a call of the model, and notices weights in it."""
        kwargs = kwargs or {}
        inside = inside_of(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        found = [(tensor, *known) for tensor in tensors if (known := self._weights.found(tensor)) is not None]
        used = [entry for entry in found if entry[1] in self._wanted]
        if used and hook_is_running():
            return func(*args, **kwargs)
        call = self._call(func, args, kwargs, used)
        if call is not None:
            return self._at_product(call, func, args, kwargs)
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        if made:
            self._note_readers(tensors)
        self.sums.call(func, args, result)
        self.held.note(tensor for tensor in made if self._weights.found(tensor) is None)
        for tensor, name, whole in used:
            if made and not any(_shares_memory(item, whole) for item in made):
                function, others = str(resolve_name(func)) + _part(tensor, whole), self.seen.others.setdefault(name, [])
                others += [] if function in others else [function]
        return result

    def maker(self, tensor: torch.Tensor) -> str:
        """Returns the weight whose product has returned this very tensor; empty if there is none."""
        return self._outputs.get(tensor) or ""

    def _call(
        self, func: Any, args: Any, kwargs: dict[str, Any], used: list[tuple[torch.Tensor, str, torch.Tensor]]
    ) -> WeightCall | None:
        if len(used) != 1:
            return None
        (tensor, name, whole), product = used[0], product_of(func, args, kwargs)
        if product is None or product.arguments.get(product.weight_argument) is not tensor:
            return None
        if product.kind == "linear" and tensor.ndim != 2:
            return None
        is_same = tensor.shape == whole.shape and tensor.stride() == whole.stride()
        is_turned = product.kind == "linear" and _is_transposed(tensor, whole)
        rows = None if is_same or is_turned or product.kind != "linear" else _rows(tensor, whole)
        if not is_same and not is_turned and rows is None:
            return None
        columns_first = product.takes_columns_first != is_turned
        use = Use(product.kind, product.groups, columns_first, self._bias(product, rows), rows)
        return WeightCall(name if rows is None else f"{name}[{rows[0]}:{rows[1]}]", use, product)

    def _bias(self, product: Product, rows: tuple[int, int] | None) -> str:
        bias = product.arguments.get("bias")
        name, stored = self._weights.found(bias) or ("", None)
        if bias is None or stored is None or bias.ndim != 1 or stored.ndim != 1:
            return ""
        part = None if bias.shape == stored.shape else _rows(bias, stored)
        return name if part == rows else ""

    def _at_product(self, call: WeightCall, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.seen.calls.setdefault(call.name, []).append(call.use)
        if self._before:
            self._reached(replace(call, shortcut=self.sums.take(call.name)))
            args, kwargs = self._renewed(call, args, kwargs)
            result = func(*args, **kwargs)
            self.held.note([result])
            self.sums.product(call.name, result)
            return result
        result = func(*args, **kwargs)
        self.held.note([result])
        self._outputs.set(result, call.name)
        self._note_readers([t for t in tensors_in((args, kwargs)) if t is call.product.arguments["input"]])
        shortcut = self.sums.take(call.name)
        self.sums.product(call.name, result)
        self._reached(replace(call, output=result, shortcut=shortcut))
        return result

    def _renewed(self, call: WeightCall, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        arguments = call.product.arguments
        old = arguments[call.product.weight_argument]
        rows = call.use.rows
        new = {id(old): self._weights.computed(call.name.partition("[")[0], old, rows)}
        if call.use.bias:
            new[id(arguments["bias"])] = self._weights.computed(call.use.bias, arguments["bias"], rows)
        return [new.get(id(arg), arg) for arg in args], {name: new.get(id(arg), arg) for name, arg in kwargs.items()}

    def _note_readers(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            name = self.maker(tensor)
            if name:
                self.seen.readers[name] = self.seen.readers.get(name, 0) + 1


def _shares_memory(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    try:
        return storage_identity(tensor) == storage_identity(whole)
    except (RuntimeError, NotImplementedError):
        return False


def _is_transposed(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    return whole.ndim == 2 and tensor.shape == whole.t().shape and tensor.stride() == whole.t().stride()


def _rows(tensor: torch.Tensor, whole: torch.Tensor) -> tuple[int, int] | None:
    """Returns the first and the last row + 1 of a part of a tensor; None if it is no block of whole rows."""
    is_block = tensor.shape[1:] == whole.shape[1:] and tensor.stride() == whole.stride() and whole.is_contiguous()
    offset = tensor.storage_offset() - whole.storage_offset()
    if not is_block or whole.stride(0) == 0 or offset % whole.stride(0):
        return None
    start = offset // whole.stride(0)
    return start, start + len(tensor)


def _part(tensor: torch.Tensor, whole: torch.Tensor) -> str:
    return "" if tensor.numel() == whole.numel() else f", with a part of shape {tuple(tensor.shape)}"
