"""Call sites: transforms arguments and results of functions that a module's forward calls.

A `TorchFunctionMode` around the forward sees every call of a torch function by the module and its submodules. It counts
the calls of functions that have a transform, except calls inside users' forward hooks. Calls made by transforms are
hidden from all such modes (`run_quietly`), so that a transform at one place does not shift the count at another.

Each forward has its own mode object, so that recursive calls and threads do not interfere.
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
    CHECKPOINT_OPERATOR,
    TorchFunctionDisabled,
    function_mode_at,
    function_mode_count,
    pop_function_mode,
    push_function_mode,
)
from compress_core.transforms.activation_functions import activation_called
from compress_core.transforms.attention import inside_of
from compress_core.transforms.gradient_checkpoints import Surroundings, note_checkpoints
from compress_core.transforms.places import CallInput, CallOutput, CallPattern, Path
from compress_core.transforms.user_hooks import count_traced, is_in_hook, is_in_traced_hook

T = TypeVar("T")

# The end of the names that torch.overrides gives to properties: torch.Tensor.real.__get__.
_PROPERTY = ".__get__"

# Functions written in Python that dynamo shows to modes like those written in C.
_NEVER_HIDDEN = frozenset(
    f"torch.nn.functional.{name}"
    for name in (
        *("relu", "relu6", "silu", "hardtanh", "elu", "leaky_relu", "selu", "celu", "mish", "glu", "softmax"),
        *("layer_norm", "group_norm", "instance_norm", "normalize", "interpolate", "max_pool2d", "adaptive_avg_pool2d"),
    )
)


@dataclass(frozen=True)
class Site:
    """One place in the calls of a function: the name of its chain, the calls, and the tensor."""

    chain: str
    place: CallInput | CallOutput
    path: Path

    @property
    def calls(self) -> CallPattern:
        """The calls that belong to the site."""
        return self.place.calls


@dataclass(frozen=True)
class TransformedFunction:
    """A function that has sites in the forward of a module.

    Attributes:
        name: Its name, as `torch.overrides.resolve_name` gives it.
        objects: The function objects that have this name.
        inputs: Sites at its arguments.
        outputs: Sites at its results.
        in_place: Whether it writes to its first argument, so that callers may ignore the result.
        activation: Its name in `ACTIVATION_FUNCTIONS`, if a transform can compute it as well.
    """

    name: str
    objects: tuple[Any, ...]
    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]
    in_place: bool
    activation: str | None

    @property
    def calls(self) -> CallPattern:
        """The calls that a forward is expected to make, which are the same for all sites of the function."""
        return (*self.inputs, *self.outputs)[0].calls

    @property
    def may_be_hidden(self) -> bool:
        """Whether dynamo may hide the function from modes, as it does with some functions written in Python."""
        return self.name not in _NEVER_HIDDEN and all(isinstance(f, FunctionType) for f in self.objects)


def transformed_functions(sites: dict[str, CallInput | CallOutput]) -> tuple[TransformedFunction, ...]:
    """Groups the sites of a module (chain name -> place) by function."""
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
    """Returns the function objects to which `torch.overrides.resolve_name` gives this name.

    Raises:
        TransformError: No function has this name, or it is that of a property.
    """
    if name.endswith(_PROPERTY):
        raise TransformError(
            f"'{name}' is a property of tensors, which torch's compiler hides from function modes; transform what it "
            "is read from, or the calls that read it"
        )
    found = list(_overridable_functions().get(name, ()))
    # torch does not list all functions that a mode can see (torch.nn.functional.hardswish is missing).
    root, _, path = name.partition(".")
    if root == "torch" and path:
        with contextlib.suppress(AttributeError):
            # So are called those that have an underscore in front (torch._grouped_mm).
            found.append(operator.attrgetter(path.removeprefix("_VariableFunctionsClass."))(torch))
    unique = tuple({id(function): function for function in found}.values())
    if not unique:
        raise TransformError(
            f"there is no function '{name}' that torch's function modes could see; names are those that "
            "torch.overrides.resolve_name gives, such as 'torch.nn.functional.relu'"
        )
    return unique


def can_be_transformed(function: str) -> bool:
    """Returns whether calls of a function can have transforms, that is, whether `functions_named` finds it."""
    try:
        return bool(functions_named(function))
    except TransformError:
        return False


def has_floats(*structure: Any) -> bool:
    """Returns whether there is a floating or complex tensor in nested tuples, lists and mappings.

    Calls that neither take nor return one are not counted. They make positions and masks, which libraries do in another
    way on fake tensors, while torch exports a model, or when a cache is given.
    """
    for item in structure:
        if isinstance(item, torch.Tensor):
            if item.is_floating_point() or item.is_complex():
                return True
        elif isinstance(item, (tuple, list)):
            if has_floats(*item):
                return True
        elif isinstance(item, dict) and has_floats(*item.values()):
            return True
    return False


def _has_floats_out_of_sight(*structure: Any) -> bool:
    """Returns the same as `has_floats`; the user's function modes see nothing of it."""
    with TorchFunctionDisabled():
        return has_floats(*structure)


def _returning(result: Any) -> Callable[..., Any]:
    """Returns a function that returns a result, whatever its arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return result

    return run


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
        self.surroundings: Surroundings | None = None  # not while dynamo traces the forward

    def is_called_by_hook(self) -> bool:
        """Returns whether the current call is made by a user's hook and not by the forward."""
        if torch.compiler.is_dynamo_compiling():
            return is_in_traced_hook()
        return is_in_hook(sys._getframe(1), None if self.surroundings is None else self.surroundings.frame)

    def again(self) -> CallSiteMode:
        """Returns a mode that goes on from the present counts, in another run of the same calls."""
        mode = CallSiteMode(self.functions, self.training, self.apply)
        mode.counts = list(self.counts)
        return mode

    def count(self, index: int) -> int:
        """Counts a call of a function and returns its number, from 0."""
        surroundings = self.surroundings
        if torch.compiler.is_dynamo_compiling():
            if surroundings is None:
                return count_traced(index, 1)
        elif surroundings is not None and surroundings.may_be_checkpointed():
            note_checkpoints(self, surroundings)
        call = self.counts[index]
        self.counts[index] = call + 1
        return call

    def counted(self, index: int) -> int:
        """Returns the number of calls of a function so far."""
        if torch.compiler.is_dynamo_compiling() and self.surroundings is None:
            return count_traced(index, 0)
        return self.counts[index]

    def _within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that runs under this mode, for torch.compile, which runs the given one without."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def index_of(self, func: Any) -> int:
        """Returns the index of `func` among the functions, or -1."""
        # Compared one by one, because dynamo traces this and cannot guard the presence of every function in a dict.
        for index, function in enumerate(self.functions):
            for candidate in function.objects:
                if func is candidate:
                    return index
        return -1

    def transforms_next(self, index: int) -> bool:
        """Returns whether the next call of a function has a transform."""
        function, call = self.functions[index], self.counted(index)
        sites = (*function.inputs, *function.outputs)
        return any(site.calls.includes(call, training=self.training) for site in sites)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function call, with its transforms if it has any."""
        kwargs = {} if kwargs is None else kwargs
        inside = inside_of(func)
        if inside is not None and not self.is_called_by_hook():
            with self:
                return inside(*args, **kwargs)
        if func is CHECKPOINT_OPERATOR:
            return func(self._within(args[0]), *args[1:], **kwargs)
        index = self.index_of(func)
        if func is torch.Tensor.unflatten and torch.compiler.is_dynamo_compiling():
            func = torch.unflatten  # dynamo cannot trace the method while a mode is active
        if index < 0 or self.is_called_by_hook():
            return func(*args, **kwargs)
        if not _has_floats_out_of_sight(args, kwargs):
            result = func(*args, **kwargs)
            if not _has_floats_out_of_sight(result):
                return result
            return self.apply(self.functions[index], self.count(index), self.training, _returning(result), args, kwargs)
        return self.apply(self.functions[index], self.count(index), self.training, func, args, kwargs)


def run_quietly(function: Callable[..., T], *args: Any) -> T:
    """Calls `function` hidden from call-site modes, so that the calls inside it are not counted."""
    if not function_mode_count():
        return function(*args)
    if torch.compiler.is_dynamo_compiling():
        with TorchFunctionDisabled():
            return function(*args)
    # Only our modes are removed, so that those of torch.export and of the user still see everything. They are removed
    # rather than disabled, so that compiled kernels find the mode stack that they were compiled for.
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
    """Returns whether a function mode other than ours is active, which may keep references to results."""
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
        Whether the caller may do so. False if an active mode has a transform for this very call; then nothing is
        counted, and the caller must make the call.
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
        mode.count(index)
    return True


def explains(pattern: CallPattern, seen: int, *, training: bool) -> bool:
    """Returns whether `seen` calls are as many as were traced, or can be explained by longer or shorter loops."""
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
