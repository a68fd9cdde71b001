"""One forward of the uncompressed model, in which distributions are followed from batch norm to batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.attention import inside_of
from compress_core.transforms.user_hooks import hook_is_running
from compress_weight_reconstruction.data_free.distributions import Distribution, after
from compress_weight_reconstruction.data_free.through import Geometry, output_of
from compress_weight_reconstruction.interception import Interceptor, WeightCall, Weights
from compress_weight_reconstruction.marks import Marks, tensors_in

_NORMS = frozenset({F.batch_norm, torch.batch_norm})


@dataclass(frozen=True)
class Place:
    """A weight that is used once, with what is known of its input.

    Attributes:
        geometry: How it is applied.
        given: The distribution of its input by channel; None if it is not known.
        norm: Name of the batch norm that alone takes its output; empty if there is none.
        is_alone: Whether it is used once.
    """

    geometry: Geometry
    given: Distribution | None
    norm: str
    is_alone: bool


class Walk(TorchFunctionMode):
    """Follows distributions through a forward; use as a context manager around it.

    Args:
        model: The model whose forward it is, in eval mode; its weights are looked up in it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        names = frozenset(name for name, parameter in model.named_parameters() if parameter.ndim > 1)
        self._known = Marks[Distribution | None]()
        self._calls: list[tuple[WeightCall, Distribution | None]] = []
        self._norms = {
            id(module.running_mean): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, AnyBatchNorm) and module.running_mean is not None
        }
        self._follows: dict[str, str] = {}
        self._parameters = dict(model.named_parameters())
        self._products = Interceptor(Weights(model), names, self._at_product, before=False, shortcuts={})

    def places(self) -> Mapping[str, Place]:
        """Returns what was found of each weight that entered a product, by name."""
        seen, found = self._products.seen, {}
        for call, given in self._calls:
            name = call.name
            is_alone = len(seen.calls[name]) == 1 and name not in seen.others and call.use.rows is None
            norm = self._follows.get(name, "") if seen.readers.get(name, 0) == 1 else ""
            found[name] = Place(Geometry.of(call), given, norm, is_alone)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a call of the model, and notes what is known of its result."""
        kwargs = kwargs or {}
        inside = inside_of(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        if hook_is_running():
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        given = [self._known.get(tensor) for tensor in tensors]
        with self._products:
            before = len(self._calls)
            result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if len(self._calls) > before:
            call, known = self._calls[-1]
            is_whole = call.use.rows is None
            made = output_of(call, known, self._parameters[call.name]) if known is not None and is_whole else None
        elif func in _NORMS:
            made = self._norm(args, kwargs)
        else:
            made = after(func, args, kwargs, given, result)
        self._known.set(result, made)
        return result

    def _at_product(self, call: WeightCall) -> None:
        self._calls.append((call, self._known.get(call.product.arguments["input"])))

    def _norm(self, args: Any, kwargs: dict[str, Any]) -> Distribution | None:
        values = args[0] if args else kwargs["input"]
        running = args[1] if len(args) > 1 else kwargs.get("running_mean")
        name, norm = self._norms.get(id(running), ("", None))
        if norm is None:
            return None
        maker = self._products.maker(values)
        if maker:
            self._follows[maker] = name
        assert norm.running_var is not None
        spread = norm.running_var.double() / (norm.running_var.double() + norm.eps)
        weight = torch.ones_like(spread) if norm.weight is None else norm.weight.detach().double()
        bias = torch.zeros_like(spread) if norm.bias is None else norm.bias.detach().double()
        return Distribution(bias, weight.square() * spread, 1)
