"""Verifies on example inputs that the masked model and the smaller model compute the same outputs."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from compress_core.channels.decisions import freeze_decisions
from compress_core.channels.errors import ShrinkError
from compress_core.channels.inputs import InputSpec, example_arguments
from compress_core.channels.replay import Decisions
from compress_core.channels.shrinking import Shrinkage
from compress_core.data.memory import refuse_out_of_memory
from compress_core.data.rng import preserved_rng
from compress_core.data.structures import map_tensors
from compress_core.saved import damaged, parsed
from compress_core.trace.graph import tensors_with_paths
from compress_core.transforms.python_state import copied

logger = logging.getLogger(__name__)

# Rounding alone stays below 1e-12 in float64; models that compute parts of their forward in float32 come to 1e-6.
TOLERANCE = 1e-5

_SEED = 20

_DROPOUTS = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout]
)


@dataclass(frozen=True)
class Certificate:
    """How well a shrunk model agrees with the masked one on example inputs.

    Attributes:
        eval_difference: Largest difference of an output in eval mode, relative to the largest value of that output.
        train_difference: The same in training mode without dropout, including the updated running statistics; None if
            the model does not run in training mode on these inputs.
        dtype: The dtype of the computation.
        inputs: Shapes of the inputs.
    """

    eval_difference: float
    train_difference: float | None
    dtype: str
    inputs: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {**asdict(self), "inputs": [list(shape) for shape in self.inputs]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], path: str = "certificate") -> Certificate:
        """Restores an object from what `to_dict` returned.

        Args:
            saved: The dict.
            path: Where it is, for messages.

        Raises:
            StateError: `saved` was not returned by `to_dict`.
        """
        found = parsed(cls, saved, path)
        differences = {"eval_difference": found.eval_difference, "train_difference": found.train_difference}
        for name, value in differences.items():
            if value is not None and value < 0:
                raise damaged(f"{path}.{name}", f"must not be negative, got {value}")
        return found


def prove(
    model: nn.Module,
    shrinkage: Shrinkage,
    specs: Sequence[InputSpec],
    mask: Callable[[nn.Module], None] | None = None,
    *,
    training: bool = True,
) -> Certificate:
    """Shrinks a copy of a model, with its transforms in place, and compares its outputs with those of the model.

    Args:
        model: The model; it is not changed. The channels to remove must be masked.
        shrinkage: Which indices of its tensors stay.
        specs: The inputs of its forward.
        mask: Masks the channels in a copy, if they are not masked in the model.
        training: Whether to compare in training mode, too.

    Raises:
        ShrinkError: The shrunk model fails or computes something else.
    """
    with preserved_rng(), torch.no_grad():
        try:
            return _prove(model, shrinkage, specs, torch.float64, mask, training)
        except _ReferenceError as error:
            logger.debug("comparing in the model's own dtype, because it does not run in float64: %s", error)
        try:
            return _prove(model, shrinkage, specs, None, mask, training)
        except _ReferenceError as error:
            raise ShrinkError(
                f"the model does not run on inputs like those it was traced with: {error}", reference=True
            ) from error


class _ReferenceError(Exception):
    """The masked model, which is the reference of the comparison, does not run."""


def _prove(
    model: nn.Module,
    shrinkage: Shrinkage,
    specs: Sequence[InputSpec],
    dtype: torch.dtype | None,
    mask: Callable[[nn.Module], None] | None,
    training: bool,
) -> Certificate:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # The smaller model first, and converted to float64 only when it is small, so there is at most one large copy.
    shrunk = _copy_to_compare(model, mask)
    shrinkage.apply(shrunk)
    reference = _copy_to_compare(model, mask)
    # Decisions are made in the model's own dtype, as in the other copy: float64 could decide near-ties differently.
    freeze_decisions(reference, shrinkage.kept)
    if dtype is not None:
        shrunk.double()
        reference.double()
    inputs = example_arguments(specs, device, dtype, small=True)
    try:
        expected = _run(reference.eval(), inputs)
    except Exception as error:  # a batch size that is hard-coded
        refuse_out_of_memory(error)
        inputs, expected = example_arguments(specs, device, dtype, small=False), None
    eval_difference = _compare(reference.eval(), shrunk.eval(), inputs, "eval", expected)
    train_difference: float | None = None
    try:
        if training:
            train_difference = _compare(reference.train(), shrunk.train(), inputs, "training")
    except _ReferenceError as error:
        logger.debug("no comparison in training mode: %s", error)
    if train_difference is not None:
        train_difference = max(train_difference, _buffer_difference(reference, shrunk, shrinkage))
    name = str(dtype or next((p.dtype for p in reference.parameters()), torch.float32)).removeprefix("torch.")
    return Certificate(eval_difference, train_difference, name, tuple(spec.shape for spec in specs))


def _copy_to_compare(model: nn.Module, mask: Callable[[nn.Module], None] | None) -> nn.Module:
    twin = copied(model)
    if mask is not None:
        mask(twin)
    for module in twin.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    return twin


def _compare(reference: nn.Module, shrunk: nn.Module, inputs: Any, mode: str, given: Any = None) -> float:
    try:
        expected = dict(tensors_with_paths(_run(reference, inputs) if given is None else given))
    except Exception as error:
        refuse_out_of_memory(error)
        raise _ReferenceError(str(error)) from error
    with _running_modules(shrunk) as running:
        try:
            actual = dict(tensors_with_paths(_run(shrunk, inputs)))
        except Exception as error:
            refuse_out_of_memory(error)
            module = running.innermost()
            raise ShrinkError(
                f"a forward with fewer channels fails in '{module or 'the model'}' ({mode} mode): "
                f"{_first_line(error)}. A size is written in its code; compute it from the tensor, "
                "or name the layers before it in ignored_scopes",
                module,
                training=mode == "training",
            ) from error
    difference = _largest_difference(expected, actual)
    if not difference <= TOLERANCE:
        difference = min(difference, _difference_after_replay(reference, shrunk, inputs))
    if not difference <= TOLERANCE:
        module = _first_difference(reference, shrunk, inputs)
        raise ShrinkError(
            f"the model with fewer channels computes something else from '{module or 'the model'}' on ({mode} mode, "
            f"relative difference {difference:.2g}); name the layers before it in ignored_scopes",
            module,
            training=mode == "training",
        )
    return difference


def _largest_difference(expected: Mapping[Any, torch.Tensor], actual: Mapping[Any, torch.Tensor]) -> float:
    return max((_difference(expected[path], actual.get(path)) for path in expected), default=0.0)


def _difference_after_replay(reference: nn.Module, shrunk: nn.Module, inputs: Any) -> float:
    """Returns the difference if the shrunk model decides like the reference wherever it decides on the same values."""
    recorded = Decisions()
    replayed = Decisions(recorded.found, lambda one, other: _difference(one, other) <= TOLERANCE)
    with recorded:
        expected = dict(tensors_with_paths(_run(reference, inputs)))
    try:
        with replayed:
            actual = dict(tensors_with_paths(_run(shrunk, inputs)))
    except Exception as error:
        refuse_out_of_memory(error)
        logger.debug("the model with fewer channels does not take the decisions of the masked one: %s", error)
        return math.inf
    return _largest_difference(expected, actual)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _difference(expected: torch.Tensor, actual: torch.Tensor | None, least: float = 0.0) -> float:
    """Returns the largest difference in units of the largest value, or of `least` if that is larger."""
    if actual is None or expected.shape != actual.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else math.inf
    if not expected.numel():
        return 0.0
    same = expected == actual  # equal infinities, such as masked scores, differ by NaN otherwise
    error = torch.where(same, 0.0, (expected - actual).abs())
    finite = expected[expected.isfinite()]
    scale = max(float(finite.abs().max()), least) if finite.numel() else 1.0
    largest = float(error.nan_to_num(nan=math.inf, posinf=math.inf).max())
    return largest / scale if scale > 0 else largest


def _buffer_difference(reference: nn.Module, shrunk: nn.Module, shrinkage: Shrinkage) -> float:
    found = 0.0
    buffers, smaller = dict(reference.named_buffers()), dict(shrunk.named_buffers())
    for name, buffer in buffers.items():
        expected = shrinkage.slice(name, buffer) if name in shrinkage.kept else buffer
        # The mean of what another batch norm has centred is zero up to rounding, which goes with the size of values.
        variance = buffers.get(f"{name.removesuffix('running_mean')}running_var")
        least = 0.0 if variance is None or not variance.numel() else float(variance.max().sqrt())
        found = max(found, _difference(expected, smaller.get(name), least))
    if not found <= TOLERANCE:
        message = f"running statistics of the model with fewer channels differ by {found:.2g}"
        raise ShrinkError(message, training=True)
    return found


# Forwards.


class _NoDropout(TorchFunctionMode):
    """Disables dropout, which draws a random number per channel, so that both models see the same random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0} if len(args) < 5 else kwargs
            args = (*args[:4], 0.0, *args[5:]) if len(args) >= 5 else args
        return func(*args, **kwargs)


def _run(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(_SEED)
    random.seed(_SEED)  # a forward may draw from these, too
    np.random.seed(_SEED)
    # A forward may write to its arguments.
    args, kwargs = map_tensors(torch.clone, inputs)
    with _NoDropout(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


class _ForwardStack:
    """Tracks the modules whose forwards are running, to name the innermost one after an exception."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.deepest: list[str] | None = None

    def innermost(self) -> str:
        stack = self.deepest or self.stack
        return stack[-1] if stack else ""


@contextlib.contextmanager
def _running_modules(model: nn.Module) -> Iterator[_ForwardStack]:
    running, handles = _ForwardStack(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            running.stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(reference: nn.Module, shrunk: nn.Module, inputs: Any) -> str:
    """Returns the first module whose output has the same shape but different values in the two models."""
    pairs = zip(_recorded(reference, inputs), _recorded(shrunk, inputs), strict=False)
    for (name, expected), (_, actual) in pairs:
        if expected is None or actual is None or expected.shape != actual.shape:
            continue
        if not _difference(expected, actual) <= TOLERANCE:
            return name
    return ""


def _recorded(model: nn.Module, inputs: Any) -> list[tuple[str, torch.Tensor | None]]:
    found: list[tuple[str, torch.Tensor | None]] = []
    handles = []
    for name, module in model.named_modules():

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            keep = isinstance(output, torch.Tensor) and output.numel() < 1 << 20
            found.append((name, output.clone() if keep else None))

        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_hook(leave))
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
