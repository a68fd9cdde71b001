"""Sizes that are written in the code of a forward, found by running it with fewer channels on tensors without values.

Labels say which shape every tensor has when channels are gone. A copy of the model whose parameters are that small, and
fake, runs beside the trace: the first function call that fails, or whose result has another shape, has a size in its
code (`x.view(batch, 64, -1)`). The channels that it takes keep their number, here and wherever the same line of code
runs, and the copy runs again.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compress_core.channels.algebra import Algebra, Dims, Obstacle
from compress_core.channels.proof import input_specs, random_arguments
from compress_core.channels.shrinking import update_attributes
from compress_core.rng import preserved_rng
from compress_core.trace.graph import Call, ForwardTrace, tensors_with_paths
from compress_core.trace.recorder import fake_batch_norm, name_of
from compress_core.transforms import has_transforms
from compress_core.transforms.attention import inside_of

logger = logging.getLogger(__name__)

_REASON = "a size is written in the code"

# Functions that make a tensor of a shape that the caller computes, and others with sizes inside.
_SHAPED = frozenset(
    f"torch.Tensor.{name}"
    for name in (
        *("view", "reshape", "expand", "unflatten", "repeat", "split", "split_with_sizes", "as_strided", "tile"),
        *("new_empty", "new_zeros", "new_ones", "new_full"),
    )
) | {
    "torch.reshape",
    "torch.split",
    "torch.functional.split",
    "torch.unflatten",
    "torch.tile",
    "torch.broadcast_to",
    "torch._native_multi_head_attention",
    "torch._transformer_encoder_layer_fwd",
}

# A forward, and the labels of its values.
Labelled: TypeAlias = "tuple[ForwardTrace, dict[int, Dims]]"


@dataclass(frozen=True)
class Sizes:
    """Which channels are gone.

    Attributes:
        kept: Whether each label stays; shape (labels,).
    """

    kept: np.ndarray
    _lengths: dict[int, int] = field(default_factory=dict)

    def shape(self, dims: Dims, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of a tensor that had `shape`."""
        return tuple(size if labels is None else self.length(labels) for labels, size in zip(dims, shape, strict=True))

    def length(self, labels: np.ndarray) -> int:
        """Returns how many of some labels stay."""
        # By identity: the same arrays go through a whole network, and are alive as long as the labels of its values.
        key = id(labels)
        if key not in self._lengths:
            self._lengths[key] = int(self.kept[labels].sum())
        return self._lengths[key]

    def shrinks(self, labels: np.ndarray | None) -> bool:
        """Tells whether some of the labels are gone."""
        return labels is not None and self.length(labels) < len(labels)


def rehearse(
    model: nn.Module, forwards: Iterable[Labelled], algebra: Algebra, half: Callable[[Algebra], np.ndarray]
) -> None:
    """Fixes the channels whose number the code of a model's forward knows.

    Args:
        model: The model; it is not changed.
        forwards: Its forwards with the labels of their values.
        algebra: Where channels are fixed.
        half: Returns which labels stay when about half of the channels of each group go.
    """
    if has_transforms(model):
        return  # they have shapes of their own; what is planned for is a plain model
    for forward, labels in forwards:
        try:
            _rehearse(model, forward, labels, algebra, half)
        except Exception as error:
            logger.debug("the forward was not tried with fewer channels: %s", error)


def _rehearse(
    model: nn.Module,
    forward: ForwardTrace,
    labels: dict[int, Dims],
    algebra: Algebra,
    half: Callable[[Algebra], np.ndarray],
) -> None:
    calls = [call for call in forward.calls if call.outputs]
    while any(call.function in _SHAPED for call in calls):
        kept = half(algebra)
        if kept.all():
            return
        sizes = Sizes(kept)
        if not any(_knows_sizes(call, forward, labels, sizes) for call in calls):
            return
        position = _deviation(model, forward, calls, labels, sizes, algebra)
        if position is None:
            return
        if not _fix(forward, calls, position, labels, sizes, algebra):
            logger.debug("the forward ran differently for a reason that has nothing to do with channels")
            return


def _knows_sizes(call: Call, forward: ForwardTrace, labels: dict[int, Dims], sizes: Sizes) -> bool:
    """Tells whether a call was given the number of channels by the code around it."""
    if call.function not in _SHAPED or not any(
        sizes.shrinks(entry) for _, value in call.inputs for entry in labels.get(value, [])
    ):
        return False
    given = [size for argument in call.arguments[1:] for size in (argument if _is_list(argument) else [argument])]
    dims = labels.get(call.outputs[0][1], [])
    if call.keywords or not call.function.endswith(("view", "reshape")) or len(given) != len(dims):
        return True
    return any(sizes.shrinks(entry) and size != -1 for entry, size in zip(dims, given, strict=True))


def _is_list(argument: Any) -> bool:
    return isinstance(argument, (tuple, list))


def _fix(
    forward: ForwardTrace,
    calls: list[Call],
    position: int,
    labels: dict[int, Dims],
    sizes: Sizes,
    algebra: Algebra,
) -> bool:
    """Fixes what the deviating call takes; where that is nothing that shrinks, what the next call does."""
    for culprit in calls[position:]:
        same = [call for call in calls if _place(call) == _place(culprit)]
        found = False
        for call in [culprit, *same]:
            operators = [forward.operators[index].name for index in call.operators]
            obstacle = Obstacle(call.module, operators[-1] if operators else call.function, _REASON)
            for _, value in call.inputs:
                for entry in labels.get(value, []):
                    if sizes.shrinks(entry):
                        algebra.fix(entry, obstacle)
                        found = True
        if found:
            return True
    return False


def _place(call: Call) -> tuple[str, tuple[int, int] | None]:
    return call.function, call.location[-1] if call.location else None


def _deviation(
    model: nn.Module,
    forward: ForwardTrace,
    calls: list[Call],
    labels: dict[int, Dims],
    sizes: Sizes,
    algebra: Algebra,
) -> int | None:
    """Returns the number of the first call that does not do with fewer channels what the labels say."""
    untracked: Dims = []
    expected = [
        [sizes.shape(labels.get(value, untracked) or [None] * rank, shape) for value, shape, rank in results]
        for results in (
            [(v, forward.values[v].shape, len(forward.values[v].shape)) for _, v in call.outputs] for call in calls
        )
    ]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = random_arguments(input_specs(forward), device, None, small=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    smaller = _copy(model, mode, sizes, algebra).train(forward.training)
    comparison = _Comparison(calls, expected)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        stack.enter_context(_quiet())
        stack.enter_context(mode)
        stack.enter_context(_Operators())  # type: ignore[no-untyped-call]
        stack.enter_context(comparison)
        try:
            smaller(*args, **kwargs)
        except _Deviation:
            return comparison.position
        except Exception as error:
            logger.debug("with fewer channels, call %d fails: %s", comparison.position, error)
            return comparison.position
    return None


def _copy(model: nn.Module, mode: FakeTensorMode, sizes: Sizes, algebra: Algebra) -> nn.Module:
    """Returns the model with fewer channels, without values: only its structure is copied."""
    memo: dict[int, Any] = {}
    changed = []
    with mode:
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            dims: Dims = list(algebra.parameters.get(name, [None] * tensor.ndim))
            shape = sizes.shape(dims, tensor.shape)
            if shape != tuple(tensor.shape):
                changed.append(name)
            fake = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    smaller = copy.deepcopy(model, memo)
    update_attributes(smaller, dict.fromkeys(changed))
    return smaller


class _Deviation(BaseException):
    """The forward does something else than the trace; a model that catches exceptions must not catch it."""


class _Comparison(TorchFunctionMode):
    """Stops a forward at the first function call whose results have other shapes than expected.

    Attributes:
        position: How many calls were as expected.
    """

    def __init__(self, calls: Sequence[Call], expected: Sequence[Sequence[tuple[int, ...]]]) -> None:
        super().__init__()
        self.position = 0
        self._calls, self._expected = calls, expected
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        if (inside := inside_of(func)) is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        self._inside = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._inside = False
        with torch._C.DisableTorchFunction():
            shapes = [tuple(tensor.shape) for _, tensor in tensors_with_paths(result)]
        if shapes:
            if self.position >= len(self._calls) or name_of(func) != self._calls[self.position].function:
                raise _Deviation
            if shapes != self._expected[self.position]:
                raise _Deviation
            self.position += 1
        return result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Saves the time that torch takes for batch norm on fake tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default:
            result = fake_batch_norm(*args)
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a stack trace for each operator that fails on fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
