"""Call sites: transforming what functions are given and return while a module's forward runs.

A `TorchFunctionMode` around the forward sees each call of a torch function, made by the module itself or by modules
below, and counts those of the functions that have a transform, but not what users' forward hooks call. What the
transforms call themselves is hidden from all such modes (`run_quietly`), so that compressing one place never shifts the
count at another.

One mode object serves one forward: a module may call itself, and threads do not meet.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode, get_overridable_functions, resolve_name

from compress_core.errors import TransformError
from compress_core.torch_internals import (
    TorchFunctionDisabled,
    function_mode_at,
    function_mode_count,
    pop_function_mode,
    push_function_mode,
)
from compress_core.transforms.activation_functions import activation_called
from compress_core.transforms.attention import inside_of
from compress_core.transforms.places import CallInput, CallOutput, CallPattern, Path
from compress_core.transforms.user_hooks import FrameId, is_in_hook, is_in_traced_hook

T = TypeVar("T")

# Functions written in Python that dynamo shows to modes as those written in C.
_NEVER_HIDDEN = frozenset(
    f"torch.nn.functional.{name}"
    for name in (
        *("relu", "relu6", "silu", "hardtanh", "elu", "leaky_relu", "selu", "celu", "mish", "glu", "softmax"),
        *("layer_norm", "group_norm", "instance_norm", "normalize", "interpolate", "max_pool2d", "adaptive_avg_pool2d"),
    )
)


@dataclass(frozen=True)
class Site:
    """One place in the calls of a function: which chain, which calls, which tensor."""

    chain: str
    place: CallInput | CallOutput
    path: Path

    @property
    def calls(self) -> CallPattern:
        """Which calls belong to the site."""
        return self.place.calls


@dataclass(frozen=True)
class TransformedFunction:
    """A function that has sites below a module.

    Attributes:
        name: As `torch.overrides.resolve_name` gives it.
        objects: The function objects that have this name.
        inputs: Sites at its arguments.
        outputs: Sites at its results.
        in_place: Whether it writes to its first argument, so that callers may ignore what it returns.
        activation: Which activation function it is, of those that a transform can take over.
    """

    name: str
    objects: tuple[Any, ...]
    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]
    in_place: bool
    activation: str | None

    @property
    def calls(self) -> CallPattern:
        """The calls that a forward is expected to make; the same for all sites of the function."""
        return (*self.inputs, *self.outputs)[0].calls

    @property
    def may_be_hidden(self) -> bool:
        """Whether dynamo may hide the function from modes, as it does with some that are written in Python."""
        return self.name not in _NEVER_HIDDEN and all(isinstance(f, FunctionType) for f in self.objects)


def transformed_functions(sites: dict[str, CallInput | CallOutput]) -> tuple[TransformedFunction, ...]:
    """Groups the sites below a module (chain name to place) by function."""
    found = []
    for name in dict.fromkeys(place.function for place in sites.values()):
        mine = {chain: place for chain, place in sites.items() if place.function == name}
        last = name.rpartition(".")[2]
        found.append(
            TransformedFunction(
                name,
                functions_named(name),
                tuple(Site(c, p, p.argument) for c, p in mine.items() if isinstance(p, CallInput)),
                tuple(Site(c, p, p.item) for c, p in mine.items() if isinstance(p, CallOutput)),
                in_place=last.endswith("_") and not last.endswith("__"),
                activation=activation_called(name),
            )
        )
    return tuple(found)


@functools.cache
def _overridable_functions() -> dict[str, list[Any]]:
    index: dict[str, list[Any]] = {}
    for functions in get_overridable_functions().values():
        for function in functions:
            index.setdefault(str(resolve_name(function)), []).append(function)
    return index


@functools.cache
def functions_named(name: str) -> tuple[Any, ...]:
    """Returns the function objects that `torch.overrides.resolve_name` gives this name.

    Raises:
        TransformError: There is none.
    """
    found = list(_overridable_functions().get(name, ()))
    # Not all functions that a mode gets to see are listed (torch.nn.functional.hardswish is not).
    root, _, path = name.partition(".")
    if root == "torch" and path:
        with contextlib.suppress(AttributeError):
            found.append(operator.attrgetter(path)(torch))
    unique = tuple({id(function): function for function in found}.values())
    if not unique:
        raise TransformError(
            f"there is no function '{name}' that torch's function modes could see; names are those that "
            "torch.overrides.resolve_name gives, such as 'torch.nn.functional.relu'"
        )
    return unique


class CallSiteMode(TorchFunctionMode):
    """Applies the transforms of a module's call sites during one forward.

    Args:
        functions: The functions that have sites.
        training: Whether the module is in training mode.
        apply: Called as `apply(function, calls so far, training, func, args, kwargs)` for each call of such a function.
    """

    def __init__(self, functions: tuple[TransformedFunction, ...], training: bool, apply: Callable[..., Any]) -> None:
        super().__init__()
        self.functions = functions
        self.training = training
        self.apply = apply
        self.counts = [0] * len(functions)
        self.around: FrameId | None = None  # the frame that runs the forward

    def is_called_by_hook(self) -> bool:
        """Tells whether a user's hook, and not the forward, makes the call that the mode is asked about."""
        if torch.compiler.is_dynamo_compiling():
            return is_in_traced_hook()
        return is_in_hook(sys._getframe(1), self.around)

    def index_of(self, func: Any) -> int:
        """Returns which of the functions `func` is, or -1."""
        # Compared one by one: dynamo traces this, and cannot for every function guard its presence in a dict.
        for index, function in enumerate(self.functions):
            for candidate in function.objects:
                if func is candidate:
                    return index
        return -1

    def transforms_next(self, index: int) -> bool:
        """Tells whether the next call of a function has a transform."""
        function, call = self.functions[index], self.counts[index]
        sites = (*function.inputs, *function.outputs)
        return any(site.calls.includes(call, training=self.training) for site in sites)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function call, with its transforms if it has any."""
        kwargs = {} if kwargs is None else kwargs
        inside = inside_of(func)
        if inside is not None and not self.is_called_by_hook():
            with self:
                return inside(*args, **kwargs)
        index = self.index_of(func)
        if func is torch.Tensor.unflatten and torch.compiler.is_dynamo_compiling():
            func = torch.unflatten  # dynamo cannot trace the method while a mode is active
        if index < 0 or self.is_called_by_hook():
            return func(*args, **kwargs)
        call = self.counts[index]
        self.counts[index] = call + 1
        return self.apply(self.functions[index], call, self.training, func, args, kwargs)


def run_quietly(function: Callable[..., T], *args: Any) -> T:
    """Calls `function` hidden from call-site modes, so that what it calls is not counted."""
    if not function_mode_count():
        return function(*args)
    if torch.compiler.is_dynamo_compiling():
        with TorchFunctionDisabled():
            return function(*args)
    # Only our modes are taken off: those of torch.export and of the user go on seeing everything. And they are taken
    # off rather than disabled, so that compiled kernels find the mode stack that they were compiled for.
    stack = [function_mode_at(i) for i in range(function_mode_count())]
    others = [mode for mode in stack if not isinstance(mode, CallSiteMode)]
    if len(others) == len(stack):
        return function(*args)
    _set_stack(others)
    try:
        return function(*args)
    finally:
        _set_stack(stack)


def is_observed() -> bool:
    """Tells whether a function mode other than ours is active, which may keep what functions return."""
    size = function_mode_count()
    return not all(isinstance(function_mode_at(i), CallSiteMode) for i in range(size))


def _set_stack(modes: list[Any]) -> None:
    for _ in range(function_mode_count()):
        pop_function_mode()
    for mode in modes:
        push_function_mode(mode)


def count_replaced(functions: tuple[Any, ...]) -> bool:
    """Counts a call of one of the functions that is about to be computed in another way.

    Returns:
        Whether that may be done: not when a mode that is active now transforms this very call. Then nothing is counted,
        and the call must be made.
    """
    found: list[tuple[CallSiteMode, int]] = []
    for position in range(function_mode_count()):
        mode = function_mode_at(position)
        if not isinstance(mode, CallSiteMode):
            continue
        index = max(mode.index_of(function) for function in functions)
        if index >= 0 and not mode.is_called_by_hook():
            if mode.transforms_next(index):
                return False
            found.append((mode, index))
    for mode, index in found:
        mode.counts[index] += 1
    return True


def explains(pattern: CallPattern, seen: int, *, training: bool) -> bool:
    """Tells whether `seen` calls are what was traced, or the same with loops that run longer or shorter."""
    expected = pattern.expected(training=training)
    if pattern.was_traced(seen, training=training):
        return True
    for period in range(1, len(expected) // 2 + 1):
        if expected[-period:] == expected[-2 * period : -period]:
            turns = 2
            while expected[-(turns + 1) * period : -turns * period] == expected[-period:]:
                turns += 1
            return (seen - len(expected)) % period == 0 and seen >= len(expected) - (turns - 1) * period
    return False
