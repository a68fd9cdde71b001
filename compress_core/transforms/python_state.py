"""Saves and restores what forwards of a model keep in Python objects.

A forward may leave something behind in many places: attributes, containers and objects in them, class attributes,
closures, global variables, default arguments, `functools.lru_cache`, random generators. They are found from the modules
of the model and from the names in the code that their forwards and hooks can reach.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from compress_core.torch_internals import HOOK_ATTRIBUTES
from compress_core.transforms.chain import TransformContainer
from compress_core.transforms.containers import SavedContainer, SavedSlots, container_base
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE
from compress_core.transforms.walk import modules_of

_MISSING: Any = object()
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, BuiltinFunctionType)
# What torch, algorithms and we change; the values of parameters and buffers are the caller's business.
_STRUCTURE = frozenset(
    ["_parameters", "_buffers", "_modules", "training", ACTIVATIONS_ATTRIBUTE]
    + [name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
)
# Enough for caches; limited, so that a module that refers to its trainer does not make us copy a data set.
_DEEPEST, _MOST_ITEMS, _MOST_FUNCTIONS = 5, 1000, 5000
_MOST_BYTES = 1 << 26
# Packages whose code keeps nothing for a model, and classes of the standard library that users keep things in.
_OTHERS_CODE = frozenset(["torch", "numpy", "functorch", "compress_core"])
_STANDARD_HOLDERS = frozenset(["argparse", "collections", "types", "weakref"])
_LruCache = type(functools.lru_cache(lambda: None))


class _Saved(Protocol):
    def is_same(self) -> bool: ...

    def restore(self) -> None: ...


class PythonState:
    """What a model's forwards may keep outside of its parameters and buffers, at the time of creation.

    Args:
        model: The model; it is not changed.
        left_out: Modules that belong to an algorithm, besides transforms.
        hooks: Whether the user's hooks count as well; not while an algorithm has hooks of its own in the model.

    Attributes:
        tensors: Tensors that are neither parameters nor buffers of the model, with the names of the attributes that
            lead to them. Their values are not saved here.
    """

    def __init__(self, model: nn.Module, left_out: Iterable[nn.Module] = (), *, hooks: bool = True) -> None:
        self._hooks = hooks
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self._saved: list[_Saved] = []
        self._bindings: dict[int, dict[str, Any]] = {}  # id of a namespace -> the variables saved of it
        everything = list(modules_of(model))
        containers = (module for module in everything if isinstance(module, TransformContainer))
        self._seen = {id(inner) for owned in (*containers, *left_out) for inner in modules_of(owned)}
        self._classes: set[type] = set()
        self._members: dict[str, list[Any]] = {}
        self._names: set[str] = set()
        self._functions: list[Any] = []
        modules = [(name, module) for name, module in model.named_modules() if id(module) not in self._seen]
        self._seen.update(id(module) for _, module in modules)
        self._seen.update(
            id(t) for module in everything for t in (*module._parameters.values(), *module._buffers.values())
        )
        for name, module in modules:
            self._save_module(name, module)
        while self._functions:
            self._save_function(self._functions.pop())

    def is_same(self) -> bool:
        """Returns whether nothing has changed."""
        return all(saved.is_same() for saved in self._saved)

    def restore(self) -> None:
        """Restores everything; what has not changed is not touched."""
        for saved in self._saved:
            saved.restore()

    # Objects.

    def _save_module(self, name: str, module: nn.Module) -> None:
        attributes = module.__dict__
        self._saved.append(SavedContainer(attributes, _STRUCTURE))
        self._save_slots(module, name, 0)
        for key, value in attributes.items():
            if key not in _STRUCTURE:
                self._visit(value, f"{name}.{key}" if name else key, 0)
        for kind in HOOK_ATTRIBUTES if self._hooks else ():
            for hook in attributes.get(kind, {}).values():
                self._visit(hook, f"a hook of '{name}'", 0)
        self._add_class(type(module), "forward", "__call__")

    def _visit(self, value: Any, where: str, depth: int) -> None:
        if type(value) in _PLAIN or isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append((where, value))
        elif isinstance(value, (FunctionType, MethodType, functools.partial, _LruCache, staticmethod, classmethod)):
            self._functions.append(value)
        elif container_base(value) is not None:
            saved = SavedContainer(value)
            self._saved.append(saved)
            self._visit_all(saved.values, where, depth)
            self._save_object(value, where, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._visit_all(value, where, depth)
            self._save_object(value, where, depth)
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self._saved.append(SavedGenerator(value))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _MOST_BYTES and value.dtype != object:
                self._saved.append(SavedArray(value))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, nn.Module):  # kept out of the children, in a list for example
            self._save_hidden(value, where)
        elif not isinstance(value, ModuleType) and _holds_state(type(value)):
            self._save_object(value, where, depth)
            self._add_class(type(value), "__call__")

    def _visit_all(self, items: Iterable[Any], where: str, depth: int) -> None:
        found = list(items)
        if len(found) <= _MOST_ITEMS:
            for item in found:
                self._visit(item, where, depth + 1)

    def _save_object(self, value: Any, where: str, depth: int) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._visit(attributes, where, depth)
        self._save_slots(value, where, depth)

    def _save_slots(self, value: Any, where: str, depth: int) -> None:
        slots = SavedSlots(value)
        if slots.values or not slots.is_same():
            self._saved.append(slots)
            self._visit_all(slots.values, where, depth)

    def _save_hidden(self, module: nn.Module, where: str) -> None:
        for inner in module.modules():
            self._seen.add(id(inner))
            self._saved += [SavedContainer(inner._buffers), SavedContainer(inner._modules)]
            self.tensors += [(where, buffer) for buffer in inner._buffers.values() if buffer is not None]
            self._seen.update(id(tensor) for tensor in (*inner._parameters.values(), *inner._buffers.values()))
            self._save_module(where, inner)

    # Code.

    def _add_class(self, cls: type, *methods: str) -> None:
        for base in cls.__mro__:
            if base in self._classes or not _is_users(base.__module__):
                continue
            self._classes.add(base)
            if "_compress_base_class" not in vars(base):
                self._saved.append(_SavedClass(base))
            for name, member in vars(base).items():
                self._members.setdefault(name, []).append(member)
                if name in self._names:
                    self._visit_member(base, member)
                elif not name.startswith("__") and container_base(member) is not None:
                    self._visit(member, f"{base.__name__}.{name}", 0)
        self._follow_names(methods)

    def _visit_member(self, cls: type | None, member: Any) -> None:
        if isinstance(member, property):
            for part in (member.fget, member.fset):
                self._visit(part, "a property", 0)
        else:
            self._visit(member, "a class attribute" if cls is None else f"an attribute of {cls.__name__}", 0)

    def _follow_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                self._names.add(name)
                for member in self._members.get(name, ()):
                    self._visit_member(None, member)

    def _save_function(self, function: Any) -> None:
        if len(self._seen) > 100 * _MOST_FUNCTIONS:
            return
        if isinstance(function, _LruCache):
            self._saved.append(_SavedLruCache(function))
            self._visit(getattr(function, "__wrapped__", None), "a cached function", 0)
        elif isinstance(function, functools.partial):
            self._visit_all([function.func, *function.args, *function.keywords.values()], "a partial", 0)
        elif isinstance(function, MethodType):
            self._visit_all([function.__func__, function.__self__], "a method", 0)
        elif isinstance(function, (staticmethod, classmethod)):
            self._visit(function.__func__, "a method", 0)
        elif _is_users(function.__module__ or ""):
            self._save_code(function)

    def _save_code(self, function: FunctionType) -> None:
        where = f"a variable of {function.__qualname__}"
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen.add(id(cell))
                saved = _SavedCell(cell)
                self._saved.append(saved)
                self._visit(saved.value, where, 0)
        self._visit_all(function.__defaults__ or (), where, 0)
        self._visit_all((function.__kwdefaults__ or {}).values(), where, 0)
        if function.__dict__:
            self._visit(function.__dict__, where, 0)
        else:
            self._saved.append(SavedContainer(function.__dict__))
        names = names_in(function.__code__)
        self._follow_names(names)
        self._save_variables(function.__globals__, names)

    def _save_variables(self, namespace: dict[str, Any], names: Iterable[str]) -> None:
        known = self._bindings.get(id(namespace))
        if known is None:
            known = self._bindings[id(namespace)] = {}
            self._saved.append(_SavedVariables(namespace, known))
        names = tuple(names)
        for name in names:
            if name in known or name.startswith("__"):
                continue
            value = known[name] = namespace.get(name, _MISSING)
            if isinstance(value, ModuleType):
                if _is_users(value.__name__) and value.__dict__ is not namespace:
                    self._save_variables(value.__dict__, names)
            elif value is not _MISSING:
                self._visit(value, f"the global variable '{name}'", 0)


def copied(model: nn.Module, shared: Iterable[torch.Tensor] = ()) -> nn.Module:
    """Returns a deep copy of a model, which may keep results of a forward.

    torch refuses to copy results that have a graph; the copy has them without it. The tensors `shared` are in both.
    """
    same = {id(tensor): tensor for tensor in shared}
    try:
        return copy.deepcopy(model, dict(same))
    except RuntimeError:
        kept = [*(tensor for _, tensor in PythonState(model).tensors), *model.buffers()]
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf} | same)


@functools.lru_cache(maxsize=1 << 13)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Returns the names of global variables and attributes in a function and in the functions inside it."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in names_in(constant)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


@functools.lru_cache(maxsize=1 << 12)
def _is_users(module: str) -> bool:
    """Returns whether the code of a module may be that of a model, rather than of torch or of the standard library."""
    root = module.partition(".")[0]
    return root not in _OTHERS_CODE and root not in sys.stdlib_module_names and root != "builtins"


def _holds_state(cls: type) -> bool:
    return _is_users(cls.__module__) or cls.__module__.partition(".")[0] in _STANDARD_HOLDERS


class _SavedClass:
    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._saved = self._read()

    def _read(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._cls).items() if not name.startswith(("__", "_abc_"))}

    def is_same(self) -> bool:
        now = self._read()
        return len(now) == len(self._saved) and all(now.get(key, _MISSING) is v for key, v in self._saved.items())

    def restore(self) -> None:
        now = self._read()
        for name in now.keys() - self._saved.keys():
            type.__delattr__(self._cls, name)
        for name, value in self._saved.items():
            if now.get(name, _MISSING) is not value:
                type.__setattr__(self._cls, name, value)


class _SavedVariables:
    """Some global variables of a module."""

    def __init__(self, namespace: dict[str, Any], saved: dict[str, Any]) -> None:
        self._namespace, self._saved = namespace, saved

    def is_same(self) -> bool:
        return all(self._namespace.get(name, _MISSING) is value for name, value in self._saved.items())

    def restore(self) -> None:
        for name, value in self._saved.items():
            if self._namespace.get(name, _MISSING) is value:
                continue
            if value is _MISSING:
                del self._namespace[name]
            else:
                self._namespace[name] = value


class _SavedCell:
    """A variable of a closure."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell
        self.value = self._read()

    def _read(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return _MISSING

    def is_same(self) -> bool:
        return self._read() is self.value

    def restore(self) -> None:
        if self.value is not _MISSING and not self.is_same():
            self._cell.cell_contents = self.value


class _SavedLruCache:
    """The number of results in a cache, which cannot be read: a cache that has more results is cleared.

    The function computes again what the user's own calls had cached.
    """

    def __init__(self, cache: Any) -> None:
        self._cache, self._misses = cache, cache.cache_info().misses

    def is_same(self) -> bool:
        return bool(self._cache.cache_info().misses == self._misses)

    def restore(self) -> None:
        if not self.is_same():
            self._cache.cache_clear()


class SavedGenerator:
    """The state of a random generator that belongs to the model."""

    def __init__(self, generator: Any) -> None:
        self._read, self._write = _accessors(generator)
        self._state = self._read()

    def is_same(self) -> bool:
        """Returns whether nothing was drawn from it."""
        return _is_same_state(self._read(), self._state)

    def restore(self) -> None:
        """Sets the state again."""
        self._write(self._state)


def _is_same_state(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, dict):
        return all(_is_same_state(value, right[key]) for key, value in left.items())
    if isinstance(left, tuple):
        return all(_is_same_state(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _accessors(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return generator.get_state, generator.set_state


class SavedArray:
    """The values of a NumPy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array, self._values = array, array.copy()

    def is_same(self) -> bool:
        """Returns whether all bits are the same."""
        return self._array.shape == self._values.shape and self._array.tobytes() == self._values.tobytes()

    def restore(self) -> None:
        """Writes the values into the array again, if they have changed."""
        if not self.is_same() and self._array.shape == self._values.shape:
            self._array[...] = self._values
