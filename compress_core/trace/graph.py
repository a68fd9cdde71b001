"""The data of a trace: values, the function calls that compute them, and the ATen operators inside each call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointFunction

from compress_core.data.structures import named_entries
from compress_core.transforms.generated import TRANSFORMS_ATTRIBUTE
from compress_core.transforms.places import Path

# A value of a trace: an index into `Trace.values`.
ValueId: TypeAlias = int


@dataclass(frozen=True)
class Ref:
    """A reference to a tensor in the recorded arguments of a call or operator.

    Attributes:
        value: Index of the value.
    """

    value: ValueId

    def __repr__(self) -> str:
        return f"%{self.value}"


@dataclass
class Value:
    """The content of a tensor of the forward between two writes to it.

    Attributes:
        index: Its number.
        shape: Its shape in the example forward.
        dtype: Its dtype.
        parameter: Dotted name, if it is a parameter or buffer of the model.
        call: Number of the function call that computed it; None for inputs, parameters and constants.
        operator: Number of the ATen operator that computed it; None for inputs, parameters and constants.
        inputs: Paths at which it is among the arguments of the model's forward.
        outputs: Paths at which it is in the result of the model's forward.
        before: The value of the same tensor before the last write; None if it was never written to.
    """

    index: ValueId
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str = ""
    call: int | None = None
    operator: int | None = None
    inputs: list[Path] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    before: ValueId | None = None

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"%{self.index}: {kind}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Frame:
    """A module whose forward was running when a function was called.

    Attributes:
        module: Dotted name.
        invocation: Index of this call of the module in the forward, from 0.
        depth: Number of stack frames above the module's own code.
        turn: Index of the call within the container that runs it (`nn.Sequential` calls all children in one line).
    """

    module: str
    invocation: int
    depth: int
    turn: int


# The code that runs the forward of a `torch.autograd.Function`, as in `Call.location`; since torch 2.14 it is none of
# Python's, and no frame shows it.
_APPLY = id(getattr(torch.autograd.Function.apply, "__code__", None))
_HAS_FRAME = hasattr(torch.autograd.Function.apply, "__code__")
_CHECKPOINT = id(CheckpointFunction.forward.__code__)


def _codes_of_forwards() -> set[int]:
    """Returns the codes of the forwards of all classes of `torch.autograd.Function` that there are."""
    found, waiting = set(), [torch.autograd.Function]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        code = getattr(kind.forward, "__code__", None)
        if code is not None:
            found.add(id(code))
    return found


@dataclass
class Call:
    """A function call that took or returned tensors; the level at which activations can be transformed.

    Attributes:
        index: Its number, in the order of the forward.
        function: The function's name, e.g. `torch.nn.functional.relu`; see `torch.overrides.resolve_name`.
        frames: The running modules, the model itself first; the last one makes the call.
        location: Code positions from the model's forward down to the call; equal for all iterations of a loop.
        arguments: The arguments, tensors replaced by `Ref`.
        keywords: The keyword arguments, likewise.
        inputs: The tensors among the arguments, with their paths.
        outputs: The tensors of the result, with their paths, including arguments that are returned unchanged.
        operators: Numbers of the ATen operators that it ran.
        writes: Values that it overwrote; the new values are in `outputs` or `overwritten`.
        overwritten: The new values of tensors that it wrote to but does not return (`x[i] = y`), and of tensors that
            share memory with those, if they are used later.
    """

    index: int
    function: str
    frames: tuple[Frame, ...]
    location: tuple[tuple[int, int], ...]
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    inputs: list[tuple[Path, ValueId]] = field(default_factory=list)
    outputs: list[tuple[Path, ValueId]] = field(default_factory=list)
    operators: list[int] = field(default_factory=list)
    writes: list[ValueId] = field(default_factory=list)
    overwritten: list[ValueId] = field(default_factory=list)

    @property
    def is_in_autograd_function(self) -> bool:
        """Whether a `torch.autograd.Function` makes it in its forward, where autograd does not record.

        The one of reentrant checkpoints runs its forward again in the backward pass, and autograd records that.
        """
        codes = [code for code, _ in self.location]
        if _HAS_FRAME:
            forwards = [inner for code, inner in itertools.pairwise(codes) if code == _APPLY]
        else:
            known = _codes_of_forwards()
            forwards = [code for code in codes if code in known]
        return any(code != _CHECKPOINT for code in forwards)

    @property
    def module(self) -> str:
        """Dotted name of the module that makes the call."""
        return self.frames[-1].module

    @property
    def transforms_weight(self) -> bool:
        """Whether a weight transform makes the call, so that what it computes is a weight."""
        return is_in_weight_transform(self.module)

    @property
    def results(self) -> list[ValueId]:
        """The values that this call computed, without arguments that it returned unchanged."""
        given = {value for _, value in self.inputs}
        return [v for v in dict.fromkeys([v for _, v in self.outputs] + self.overwritten) if v not in given]


@dataclass
class Operator:
    """An ATen operator; the level at which channels can be followed.

    Attributes:
        index: Its number, in the order of the forward.
        function: The overload, e.g. `torch.ops.aten.convolution.default`; `USER_HOOK` if a user's hook computed a
            tensor from others.
        arguments: The arguments, tensors replaced by `Ref`.
        keywords: The keyword arguments, likewise.
        inputs: The tensors among the arguments.
        outputs: The tensors of the result, with their paths.
        call: Number of the function call in which it ran; None if it ran outside of recorded calls.
        module: Dotted name of the innermost module whose forward was running.
        overwritten: New values of tensors that share memory with a tensor that it wrote to (`x` after a write to
            `x[0]`), if they are used later. Their shape is that of `Value.before`.
    """

    index: int
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: list[ValueId]
    outputs: list[tuple[Path, ValueId]]
    call: int | None
    module: str
    overwritten: list[ValueId] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the overload, e.g. `aten.convolution.default`."""
        return str(self.function)


@dataclass
class ModuleCall:
    """One run of a module's forward.

    Attributes:
        module: Dotted name.
        cls: Name of its class.
        invocation: Index of this call of the module in the forward, from 0.
        inputs: The tensors among the arguments, with their paths.
        outputs: The tensors of the result, with their paths.
    """

    module: str
    cls: str
    invocation: int
    inputs: list[tuple[Path, ValueId]] = field(default_factory=list)
    outputs: list[tuple[Path, ValueId]] = field(default_factory=list)


@dataclass
class ForwardTrace:
    """One forward of the model on one example.

    Attributes:
        training: Whether the model was in training mode.
        values: All tensors, by number.
        calls: The function calls, in order.
        operators: The ATen operators, in order.
        module_calls: Runs of modules, in the order in which they began.
        sequences: (module, invocation) -> function -> numbers of its calls while the module ran, including calls by
            submodules. Calls without a tensor result are not counted, nor those on integers alone (`has_floats`).
        real: Whether the forward needed values, so that it ran on real tensors.
    """

    training: bool = False
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    sequences: dict[tuple[str, int], dict[str, list[int]]] = field(default_factory=dict)
    real: bool = False

    @property
    def inputs(self) -> list[Value]:
        """The input tensors of the model."""
        return [value for value in self.values if value.inputs]

    @property
    def outputs(self) -> list[Value]:
        """The tensors that the model returned."""
        return [value for value in self.values if value.outputs]

    def consumers(self) -> dict[ValueId, list[tuple[int, Path]]]:
        """Returns, for each value, the calls that read it: (number of the call, path of the argument)."""
        found: dict[ValueId, list[tuple[int, Path]]] = {value.index: [] for value in self.values}
        for call in self.calls:
            for path, value in call.inputs:
                found[value].append((call.index, path))
        return found


def is_in_weight_transform(module: str) -> bool:
    """Returns whether a module belongs to the transforms of a weight, by its dotted name."""
    return TRANSFORMS_ATTRIBUTE in module.split(".")


def tensors_with_paths(structure: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yields the tensors in nested tuples, lists, mappings and dataclasses, with their paths."""
    if isinstance(structure, torch.Tensor):
        yield path, structure
    elif isinstance(structure, (tuple, list)):
        for position, item in enumerate(structure):
            yield from tensors_with_paths(item, (*path, position))
    elif isinstance(structure, Mapping):
        for key, item in structure.items():
            if isinstance(key, (int, str)):
                yield from tensors_with_paths(item, (*path, key))
    elif is_dataclass(structure) and not isinstance(structure, type):
        for entry in fields(structure):
            yield from tensors_with_paths(getattr(structure, entry.name, None), (*path, entry.name))


def inputs_with_paths(structure: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yields the tensors in arguments of the model, with their paths; objects such as graphs hold inputs, too.

    Arguments inside of a forward are not searched like this: it would take long, and find no inputs.
    """
    if isinstance(structure, (tuple, list)):
        for position, item in enumerate(structure):
            yield from inputs_with_paths(item, (*path, position))
        return
    entries = named_entries(structure)
    if entries is None:
        yield from tensors_with_paths(structure, path)
        return
    for key, item in entries.items():
        if isinstance(key, (int, str)) and _is_found(structure, key):
            yield from inputs_with_paths(item, (*path, key))


def _is_found(structure: Any, key: int | str) -> bool:
    """Returns whether an entry can be read, and so replaced, under its name; graphs of several kinds make new ones."""
    return isinstance(structure, Mapping) or (isinstance(key, str) and hasattr(structure, key))


# Classes without a forward.
_CONTAINERS = frozenset({"ModuleList", "ModuleDict", "ParameterList", "ParameterDict"})


@dataclass
class Forwards:
    """Several forwards of one model.

    Attributes:
        forwards: Forwards in eval mode, one for each example; two if what the first one left in the model leads the
            next one to other calls.
        training: The same in training mode; None for a forward that failed.
        modules: Dotted name -> class name of every module of the model.
    """

    forwards: list[ForwardTrace]
    training: list[ForwardTrace | None] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> set[str]:
        """Names of the modules whose forward ran, or whose parameters were used, in at least one example."""
        forwards = [*self.forwards, *(f for f in self.training if f is not None)]
        ran = {run.module for forward in forwards for run in forward.module_calls}
        used = {value.parameter for forward in forwards for value in forward.values if value.parameter}
        return ran | {name.rpartition(".")[0] for name in used}

    @property
    def unreached(self) -> list[str]:
        """Names of the outermost modules that no example has reached.

        A container without a forward (`nn.ModuleList`) counts as reached if it is empty or one of its modules was
        reached.
        """
        reached = self.reached
        ancestors = {name[:at] for name in reached for at, sign in enumerate(name) if sign == "."}
        parents = {name.rpartition(".")[0] for name in self.modules}
        missing = [
            name
            for name, kind in self.modules.items()
            if name and name not in reached and name not in ancestors and (name in parents or kind not in _CONTAINERS)
        ]
        return [name for name in missing if not any(name.startswith(f"{other}.") for other in missing)]
