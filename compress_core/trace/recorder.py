"""Records one forward at two levels: function calls and the ATen operators inside them.

A `TorchFunctionMode` sees the outermost torch functions that the model's Python code calls (and those inside of
`nn.MultiheadAttention`); a `TorchDispatchMode` sees the operators that these run. Temporary forward hooks record which
module is running.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.hooks import RemovableHandle

from compress_core.torch_internals import (
    LOW_LEVEL_FUNCTIONS,
    FakeTensorMode,
    TorchDispatchMode,
    TorchFunctionDisabled,
    schema_of,
)
from compress_core.trace.fake_results import FakeResults
from compress_core.trace.graph import Call, ForwardTrace, Frame, ModuleCall, Operator
from compress_core.trace.graph import tensors_with_paths as tensors_of
from compress_core.trace.hook_results import HookResults
from compress_core.trace.positions import RunningFrame, location_below
from compress_core.trace.values import Taken, ValueTable, Write
from compress_core.transforms.attention import inside_of
from compress_core.transforms.user_hooks import FrameId, is_in_hook

# Queries that torch's own shape functions make very often; they are not recorded.
_QUERIES = frozenset({"prim.device.default", "prim.layout.default"})

# Queries that forwards make often. They compute no tensor and are not recorded; listing them saves time.
_QUESTIONS = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")]
    + [getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "stride", "__len__", "is_floating_point")]
)


@dataclass
class _RunningModule:
    """A module whose forward is running."""

    frame: Frame
    position: RunningFrame
    record: ModuleCall
    counts: dict[str, list[int]]  # its entry in `ForwardTrace.sequences`
    is_container: bool
    turns: int = 0


class Recorder:
    """Records what happens in a model while `modes()` are active.

    Args:
        model: The model; only its hooks are changed, until `close`.
        training: The mode that the model is in, stored in the trace.
        fake: The mode under which the forward runs; None for a forward on real tensors.
        before_write: Called with each tensor that is about to be written to, when tensors are real.
        results: What operators on fake tensors have returned, if it is remembered from forward to forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        training: bool,
        fake: FakeTensorMode | None = None,
        before_write: Callable[[torch.Tensor], None] | None = None,
        results: FakeResults | None = None,
    ) -> None:
        self.trace = ForwardTrace(training=training, real=fake is None)
        parameters = {id(tensor): name for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
        self._values = ValueTable(self.trace, parameters, fake)
        self._hooks = HookResults(self.trace, self._values)
        self._suspended: list[FrameType] = []  # frames of modules that hooks have called
        self._fake = fake
        self._before_write = before_write
        self._results = FakeResults() if results is None else results
        self._stack: list[_RunningModule] = []
        self._frames: tuple[Frame, ...] = ()
        self._runs: dict[str, int] = {}
        self._current: Call | None = None
        self._wrote = False
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._attach(name, module)

    def modes(self) -> tuple[TorchDispatchMode, TorchFunctionMode]:
        """Returns the modes to enter, in this order."""
        return _OperatorMode(self), _CallMode(self)

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._stack.clear()
        self._hooks.clear()
        self._values.close()

    # Modules.

    def _attach(self, name: str, module: nn.Module) -> None:
        # Our hooks are the outermost and the innermost ones, so that changes by the user's hooks are seen in between.
        enter = functools.partial(self._enter, name)
        self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
        self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._end, prepend=True))
        # Also called when the forward raises, because the model may catch the exception and continue.
        self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        # Otherwise the mode would record even a query of a tensor's shape in this hook.
        with TorchFunctionDisabled():
            frame = sys._getframe(1)
            if self._suspended or self._is_in_hook(frame.f_back):
                self._suspended.append(frame)
                return
            parent = self._stack[-1] if self._stack else None
            invocation = self._runs.get(name, 0)
            self._runs[name] = invocation + 1
            turn = 0
            if parent is not None:
                turn = parent.turns if parent.is_container else 0
                parent.turns += 1
            position = RunningFrame.of(frame, None if parent is None else parent.position)
            record = ModuleCall(name, type(module).__name__, invocation)
            counts: dict[str, list[int]] = {}
            running = Frame(name, invocation, position.depth, turn)
            self._stack.append(_RunningModule(running, position, record, counts, isinstance(module, nn.Sequential)))
            self._frames = (*self._frames, running)
            self.trace.sequences[name, invocation] = counts
            self.trace.module_calls.append(record)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._suspended:
            return
        with TorchFunctionDisabled():
            is_model = len(self._stack) == 1
            if is_model:
                self._hooks.clear()  # the arguments of the model are inputs, wherever they come from
            self._hooks.take((args, kwargs), self._frames[:-1])  # made outside of this module
            read = self._values.inputs_of if is_model else self._values.all_of
            given = [*read(tuple(args)), *read(kwargs)]
            self._stack[-1].record.inputs = given
            for path, value in given if is_model else ():
                self.trace.values[value].inputs.append(path)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._suspended:
            return
        with TorchFunctionDisabled():
            self._hooks.take(output, self._frames)
            returned = self._values.all_of(output)
            self._stack[-1].record.outputs = returned
            for path, value in returned if len(self._stack) == 1 else ():
                self.trace.values[value].outputs.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        frame = self._suspended[-1] if self._suspended else self._stack[-1].position.frame if self._stack else None
        # If a user's hook has raised before `_enter`, there is nothing to leave.
        if frame is None or sys._getframe(1) not in (frame, frame.f_back):
            return
        if self._suspended:
            self._suspended.pop()
            return
        self._stack.pop()
        self._frames = self._frames[:-1]

    def _is_in_hook(self, frame: FrameType | None) -> bool:
        """Returns whether a user's hook is running in the innermost module, or called the module that begins to run."""
        return bool(self._stack) and is_in_hook(frame, FrameId.of(self._stack[-1].position.frame))

    # Calls and operators.

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs and records a function call."""
        if not self._stack or self._current is not None or function in _QUESTIONS:
            return function(*args, **kwargs)
        if self._suspended or self._is_in_hook(sys._getframe(2)):
            return function(*args, **kwargs)
        self._hooks.take((args, kwargs), self._frames)
        taken: list[Taken] = []
        arguments = self._values.taken(tuple(args), (), taken)
        keywords = self._values.taken(kwargs, (), taken)
        call = Call(len(self.trace.calls), name_of(function), self._frames, (), arguments, keywords)
        call.inputs = [(path, value) for path, _, value in taken]
        self.trace.calls.append(call)
        self._current, self._wrote = call, False
        try:
            output = function(*args, **kwargs)
        except BaseException:
            self._discard(call)
            raise
        finally:
            self._current = None
        self._finish(call, output, taken, sys._getframe(2))
        return output

    def _finish(self, call: Call, output: Any, taken: list[Taken], caller: FrameType) -> None:
        for path, tensor in tensors_of(output):
            known = self._values.known(tensor)
            # A tensor is unknown if torch created it without the dispatcher, such as an alias.
            call.outputs.append((path, self._values.made(tensor, Write(call.index, None)) if known is None else known))
        if self._wrote:
            self._note_writes(call, taken)
        elif not call.outputs:
            # A query of a tensor (its shape, its dtype) is not a computation, so it is not recorded.
            self._discard(call)
            return
        call.location = location_below(self._stack[-1].position, caller)
        values = (self.trace.values[value].dtype for _, value in [*call.inputs, *call.outputs])
        if any(dtype.is_floating_point or dtype.is_complex for dtype in values):  # see `has_floats`
            for running in self._stack:
                running.counts.setdefault(call.function, []).append(call.index)

    def _note_writes(self, call: Call, taken: list[Taken]) -> None:
        known = {value for _, value in [*call.inputs, *call.outputs]}
        for _, tensor, before in taken:
            now = self._values.value(tensor)
            if now != before and before not in call.writes:
                call.writes.append(before)
            if now not in known and now not in call.overwritten:
                call.overwritten.append(now)

    def _discard(self, call: Call) -> None:
        self.trace.calls.pop()
        for operator in (self.trace.operators[index] for index in call.operators):
            operator.call = None
            for value in [*(value for _, value in operator.outputs), *operator.overwritten]:
                if self.trace.values[value].call == call.index:
                    self.trace.values[value].call = None
        if call.operators:
            self._values.forget_call(call.index)

    def operator(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs and records an ATen operator."""
        facts = _facts(function)
        if facts.is_query or not self._stack:
            return function(*args, **kwargs)
        written = facts.written(args, kwargs)
        if written and self._before_write is not None:
            for tensor in written:
                self._before_write(tensor)
        if self._current is None:
            if self._suspended or self._is_in_hook(sys._getframe(2)):
                output = self._run(function, args, kwargs)
                given = (tensor for _, tensor in tensors_of((args, kwargs)))
                self._hooks.note(given, (tensor for _, tensor in tensors_of(output)), written)
                return output
            self._hooks.take((args, kwargs), self._frames)
        taken: list[Taken] = []
        arguments = self._values.taken(tuple(args), (), taken)
        keywords = self._values.taken(kwargs, (), taken)
        output = self._run(function, args, kwargs)
        index = len(self.trace.operators)
        inputs = [value for _, _, value in taken]
        call = None if self._current is None else self._current.index
        operator = Operator(index, function, arguments, keywords, inputs, [], call, self._stack[-1].frame.module)
        self.trace.operators.append(operator)
        if self._current is not None:
            self._current.operators.append(index)
            self._wrote = self._wrote or bool(written)
        by = Write(call, index)
        now = [self._values.written(tensor, by) for tensor in written]
        self._note_results(operator, output, taken, now, by)
        return output

    def _note_results(self, operator: Operator, output: Any, taken: list[Taken], now: list[int], by: Write) -> None:
        given = {id(tensor) for _, tensor, _ in taken}
        results = list(tensors_of(output))
        for number, (path, tensor) in enumerate(results):
            if id(tensor) in given:
                value = self._values.value(tensor)
            elif len(now) == len(results):
                # The operator wrote to a real tensor of the model but returned the fake tensor that represents it.
                value = now[number]
                self._values.same(tensor, value)
            else:
                value = self._values.made(tensor, by)
            operator.outputs.append((path, value))
        if not results:
            operator.outputs = [((), value) for value in now]

    def _run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._fake is None:
            return function(*args, **kwargs)
        return self._results.run(self._fake, function, args, kwargs)


class _CallMode(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (inside := inside_of(func)) is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        return self._recorder.call(func, args, kwargs or {})


class _OperatorMode(TorchDispatchMode):
    # Operators such as `torch.cond` are recorded like any other.
    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operator(func, args, kwargs or {})


@dataclass(frozen=True)
class _Facts:
    """Properties of an operator that are needed to run it."""

    is_query: bool
    positions: tuple[int, ...] = ()  # of the arguments that it writes to
    names: tuple[str, ...] = ()

    def written(self, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Returns the tensors among the arguments that the operator writes to."""
        given = [args[position] for position in self.positions if position < len(args)]
        given += [kwargs[name] for name in self.names if name in kwargs]
        return [tensor for _, tensor in tensors_of(given)] if given else []


@functools.cache
def _facts(function: Any) -> _Facts:
    schema = schema_of(function)
    written = [
        (position, argument.name)
        for position, argument in enumerate(() if schema is None else schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    positions, names = tuple(p for p, _ in written), tuple(n for _, n in written)
    return _Facts(str(function) in _QUERIES, positions, names)


@functools.cache
def name_of(function: Any) -> str:
    """Returns the dotted name of a function of torch, such as `torch.nn.functional.relu`; others by module and name."""
    name = resolve_name(function)
    own = getattr(function, "__name__", "")
    if name is None and getattr(LOW_LEVEL_FUNCTIONS, own, None) is function:
        name = f"torch._VF.{own}"
    if name is None:
        name = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', repr(function))}"
    return str(name)
