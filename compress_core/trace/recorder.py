"""Recording one forward at two levels: function calls and the ATen operators inside them.

A `TorchFunctionMode` sees the functions that the model's Python code calls, outermost ones only; a `TorchDispatchMode`
sees what these do. Forward hooks, for the time of the recording, tell which module is running.

Tensors are known by identity. The recording keeps every tensor that it has seen alive, so that an identity is not used
twice; a write in place gives a tensor a new value from there on.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from compress_core.trace.graph import Call, ForwardTrace, Frame, ModuleCall, Operator, Ref, Value, ValueId
from compress_core.trace.graph import tensors_with_paths as tensors_of
from compress_core.transforms.places import Path

# Queries that torch's own shape functions make by the dozen; nothing to record.
_QUERIES = frozenset({"prim.device.default", "prim.layout.default"})


class Recorder:
    """Records what happens in a model while `modes()` are active.

    Args:
        model: The model; its hooks are the only thing that changes, until `close`.
        training: The mode that the model is in, written into the trace.
    """

    def __init__(self, model: nn.Module, *, training: bool) -> None:
        self.trace = ForwardTrace(training=training)
        self._model = model
        self._keep: list[torch.Tensor] = []
        self._known: dict[int, ValueId] = {}
        self._parameters: dict[int, str] = {}
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            self._parameters[id(tensor)] = name
        self._containers = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
        self._stack: list[Frame] = []
        self._runs: dict[str, int] = {}
        self._turns: list[int] = []
        self._current: Call | None = None
        self._root_depth = 0
        self._handles = self._attach()

    def modes(self) -> tuple[TorchDispatchMode, TorchFunctionMode]:
        """Returns the modes to enter, in this order."""
        return _OperatorMode(self), _CallMode(self)

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._keep.clear()
        self._known.clear()

    # Values.

    def value(self, tensor: torch.Tensor) -> Value:
        """Returns the value that a tensor holds now."""
        index = self._known.get(id(tensor))
        if index is None:
            index = self._new(tensor)
            self.trace.values[index].parameter = self._parameters.get(id(tensor), "")
        return self.trace.values[index]

    def made(self, tensor: torch.Tensor, operator: int | None) -> ValueId:
        """Notes that a tensor has got a new value."""
        index = self._new(tensor)
        value = self.trace.values[index]
        value.operator = operator
        value.call = None if self._current is None else self._current.index
        return index

    def _new(self, tensor: torch.Tensor) -> ValueId:
        with torch._C.DisableTorchFunction():  # asking for a shape in a hook is a call that the mode would record
            shape, dtype = tuple(tensor.shape), tensor.dtype
        index = len(self.trace.values)
        self.trace.values.append(Value(index, shape, dtype))
        self._known[id(tensor)] = index
        self._keep.append(tensor)
        return index

    def _values(self, structure: Any) -> list[tuple[Path, ValueId]]:
        return [(path, self.value(tensor).index) for path, tensor in tensors_of(structure)]

    def _described(self, structure: Any) -> Any:
        return tree_map(lambda leaf: Ref(self.value(leaf).index) if isinstance(leaf, torch.Tensor) else leaf, structure)

    # Modules.

    def _attach(self) -> list[RemovableHandle]:
        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter = functools.partial(self._enter, name)
            handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(functools.partial(self._leave, name), with_kwargs=True))
        return handles

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._stack:
            self._root_depth = _depth(sys._getframe(1))
        invocation = self._runs.get(name, 0)
        self._runs[name] = invocation + 1
        turn = self._turns[-1] if self._turns else 0
        if self._turns:
            self._turns[-1] += 1
        inside_container = bool(self._stack) and self._stack[-1].module in self._containers
        depth = _depth(sys._getframe(1)) - self._root_depth
        self._stack.append(Frame(name, invocation, depth, turn if inside_container else 0))
        self._turns.append(0)
        self.trace.sequences[name, invocation] = {}
        given = [*self._values(tuple(args)), *self._values(dict(kwargs))]
        self.trace.module_calls.append(ModuleCall(name, type(module).__name__, invocation, inputs=given))
        if len(self._stack) == 1:
            for path, value in given:
                self.trace.values[value].inputs.append(path)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self._stack.pop()
        self._turns.pop()
        run = next(
            r for r in reversed(self.trace.module_calls) if r.module == name and r.invocation == frame.invocation
        )
        run.outputs = self._values(output)
        if not self._stack:
            for path, value in run.outputs:
                self.trace.values[value].outputs.append(path)

    # Calls and operators.

    def call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs and records a function call."""
        if not self._stack or self._current is not None:
            return function(*args, **kwargs)
        name = str(resolve_name(function))
        caller = sys._getframe(2)
        call = Call(len(self.trace.calls), name, tuple(self._stack), ())
        call.inputs = [*self._values(tuple(args)), *self._values(kwargs)]
        call.arguments, call.keywords = self._described(tuple(args)), self._described(kwargs)
        before = {value for _, value in call.inputs}
        tensors = [tensor for _, tensor in [*tensors_of(tuple(args)), *tensors_of(kwargs)]]
        known = len(self.trace.values)
        self.trace.calls.append(call)
        self._current = call
        try:
            output = function(*args, **kwargs)
        finally:
            self._current = None
        self._finish(call, output, tensors, before, caller)
        if not call.outputs and not call.overwritten:
            # A question about a tensor (its shape, its dtype), not a computation: leaves no trace.
            self.trace.calls.pop()
            if len(self.trace.values) > known:
                for value in self.trace.values[known:]:
                    value.call = None
        return output

    def _finish(
        self, call: Call, output: Any, tensors: list[torch.Tensor], before: set[ValueId], caller: FrameType
    ) -> None:
        for path, tensor in tensors_of(output):
            known = self._known.get(id(tensor))
            # Something that torch made without telling the dispatcher, such as an alias.
            index = self.made(tensor, None) if known is None else known
            call.outputs.append((path, index))
        returned = {value for _, value in call.outputs}
        for tensor in tensors:
            now = self._known[id(tensor)]
            if now not in before and now not in returned and now not in call.overwritten:
                call.overwritten.append(now)
        call.writes = [v for v, t in zip([v for _, v in call.inputs], tensors, strict=True) if self._known[id(t)] != v]
        if not call.outputs and not call.overwritten:
            return
        call.location = self._location(caller)
        call.result_used = _result_is_used(caller)
        for frame in self._stack:
            counts = self.trace.sequences[frame.module, frame.invocation]
            counts.setdefault(call.function, []).append(call.index)

    def operator(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs and records an ATen operator."""
        if str(function) in _QUERIES or not self._stack:
            return function(*args, **kwargs)
        arguments, keywords = self._described(tuple(args)), self._described(kwargs)
        inputs = [value for _, value in [*self._values(tuple(args)), *self._values(kwargs)]]
        written = [t for t, mutable in zip(args, _mutability(function), strict=False) if mutable]
        output = function(*args, **kwargs)
        index = len(self.trace.operators)
        call = None if self._current is None else self._current.index
        operator = Operator(index, function, arguments, keywords, inputs, [], call, self._stack[-1].module)
        self.trace.operators.append(operator)
        if self._current is not None:
            self._current.operators.append(index)
        for tensor in written:
            if isinstance(tensor, torch.Tensor):
                self.made(tensor, index)
        written_ids = {id(tensor) for tensor in written}
        for path, tensor in tensors_of(output):
            known = self._known.get(id(tensor))
            value = known if id(tensor) in written_ids and known is not None else self.made(tensor, index)
            operator.outputs.append((path, value))
        if not operator.outputs:
            operator.outputs = [((), self._known[id(t)]) for t in written if isinstance(t, torch.Tensor)]
        return output

    def _location(self, caller: FrameType) -> tuple[tuple[int, int], ...]:
        positions = []
        frame: FrameType | None = caller
        while frame is not None:
            positions.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return tuple(reversed(positions[: len(positions) - self._root_depth]))


class _CallMode(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.call(func, args, kwargs or {})


class _OperatorMode(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operator(func, args, kwargs or {})


@functools.cache
def _mutability(function: Any) -> tuple[bool, ...]:
    """Returns which positional arguments an operator writes to."""
    schema = function._schema
    return tuple(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in schema.arguments
        if not argument.kwarg_only
    )


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None:
        depth += 1
        frame = frame.f_back
    return depth


@functools.lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> dict[int, str]:
    """Returns for the offset of each instruction the name of the one that follows it."""
    names = [(i.offset, i.opname) for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    return {offset: follower for (offset, _), (_, follower) in itertools.pairwise(names)}


def _result_is_used(caller: FrameType) -> bool:
    """Tells whether code does something with the result of the call that it is in (`relu_(x)` alone does not)."""
    frame: FrameType | None = caller
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back  # torch's own Python functions hand on what they return
    if frame is None:
        return True
    return _instructions(frame.f_code).get(frame.f_lasti) != "POP_TOP"
