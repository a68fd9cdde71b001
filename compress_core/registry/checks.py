"""Strict checks of plugins: finds mistakes that pluggy accepts, with the result that a hook silently never runs."""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pluggy
from pydantic import BaseModel

from compress_core.config.sections import AlgorithmConfig, InitializerConfig, Section
from compress_core.contract import hookspecs
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.initializer import Initializer
from compress_core.contract.stages import Stage
from compress_core.errors import PluginError

_MARK = f"{hookspecs.PROJECT}_impl"
_PREFIX = "compress_"


@functools.cache
def hook_names() -> Mapping[str, tuple[str, ...]]:
    """Returns every hook of the contract with the names of its arguments."""
    found = {
        name: tuple(inspect.signature(function).parameters)
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    return MappingProxyType(found)


# Which kind of class may implement which hook; lifecycle hooks in neither set belong to algorithms.
_REGISTRATION = frozenset(
    ["compress_algorithms", "compress_initializers", "compress_choices", "compress_choice_points"]
)
_OF_INITIALIZERS = frozenset(["compress_observe", "compress_initialize"])


def check_plugin(plugin: object, label: str) -> None:
    """Checks everything in `plugin` that looks like a hook implementation against the contract.

    Args:
        plugin: A module, or an instance.
        label: How messages name it.

    Raises:
        PluginError: It is a class, implements no hook, or an implementation would not be called as intended; the
            message lists everything that is wrong.
    """
    if inspect.isclass(plugin):
        raise PluginError(f"{label} is the class {plugin.__name__}; register an instance of it, or a module")
    problems = implementation_problems(plugin)
    if problems:
        raise PluginError(f"{label}: {'; '.join(problems)}")
    if not any(hasattr(function, _MARK) for _, function in _candidates(plugin)):
        raise PluginError(f"{label} implements no hook; mark its implementations with @compress_core.hookimpl")


def implementation_problems(plugin: object, misplaced: frozenset[str] = frozenset(), instead: str = "") -> list[str]:
    """Returns what is wrong with the hook implementations of a plugin.

    Args:
        plugin: A module, or an instance.
        misplaced: Hooks that this kind of plugin may not implement.
        instead: What implements these hooks, for messages.
    """
    specs, problems = hook_names(), []
    for name, function in _candidates(plugin):
        options = getattr(function, _MARK, None)
        where = f"{name}()"
        if options is None:
            if name.startswith(_PREFIX) and name in specs:
                problems.append(f"{where} lacks the decorator @hookimpl and would never be called")
            elif name.startswith(_PREFIX) and _defined_here(plugin, function):
                problems.append(f"{where} looks like a hook, but there is none of that name.{_near(name, specs)}")
        elif options.get("specname"):
            problems.append(f"{where} uses specname={options['specname']!r}; name the method like the hook")
        elif name not in specs:
            problems.append(f"{where} implements a hook that does not exist.{_near(name, specs)}")
        elif name in misplaced:
            problems.append(f"{where} would never be called here: {instead}")
        else:
            problems += _kind_problems(function, options, name, where)
            problems += _argument_problems(function, specs[name], where)
    return problems


def _kind_problems(function: Callable[..., Any], options: dict[str, Any], name: str, where: str) -> list[str]:
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return [f"{where} is async and would never be awaited; make it a plain function"]
    wraps = options.get("wrapper") or options.get("hookwrapper")
    if inspect.isgeneratorfunction(function) and not wraps and name not in _REGISTRATION:
        return [f"{where} is a generator and would never be run; make it a plain function"]
    return []


# Classes of algorithms and initializers.


def check_algorithm(cls: type[Algorithm]) -> list[str]:
    """Returns everything that is wrong with an algorithm class."""
    name, problems = cls.__name__, _name_problems(cls)
    if not isinstance(getattr(cls, "stage", None), Stage):
        problems.append(f"{name}.stage must be a compress_core.Stage")
    problems += _config_problems(cls, AlgorithmConfig)
    for hook in ("compress_plan", "compress_commit"):
        if not callable(getattr(cls, hook, None)):
            problems.append(f"{name} must implement {hook}()")
    problems += _attribute_problems(cls, Algorithm)
    if not problems:
        leaves = set(_leaves(cls.Config))
        for leaf in cls.reads_later:
            if leaf not in leaves:
                hint = _near_word(leaf, leaves)
                problems.append(f"{name}.reads_later names '{leaf}', which is no value of {cls.Config.__name__}.{hint}")
    misplaced = "a class derived from compress_core.Initializer implements it"
    return problems + _hook_problems(cls, _OF_INITIALIZERS | _REGISTRATION, misplaced)


def check_initializer(cls: type[Initializer]) -> list[str]:
    """Returns everything that is wrong with an initializer class."""
    name, problems = cls.__name__, _name_problems(cls)
    problems += _config_problems(cls, InitializerConfig)
    if not callable(getattr(cls, "compress_initialize", None)):
        problems.append(f"{name} must implement compress_initialize()")
    problems += _attribute_problems(cls, Initializer)
    misplaced = frozenset(hook_names()) - _OF_INITIALIZERS
    return problems + _hook_problems(cls, misplaced, "a class derived from compress_core.Algorithm implements it")


def _hook_problems(cls: type[Any], misplaced: frozenset[str], instead: str) -> list[str]:
    # Without calling __init__, which needs a config; only the methods are checked here.
    instance: Any = object.__new__(cls)
    found = implementation_problems(instance, misplaced, instead)
    return [f"{cls.__name__}.{problem}" for problem in found]


def _name_problems(cls: type[Any]) -> list[str]:
    name = getattr(cls, "name", None)
    if isinstance(name, str) and name.isidentifier():
        return []
    return [f"{cls.__name__}.name must be an identifier such as 'my_method', got {name!r}"]


def _config_problems(cls: type[Any], base: type[Section]) -> list[str]:
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, base)):
        return [f"{cls.__name__}.Config must be a subclass of compress_core.{base.__name__}"]
    return [
        f"{config.__name__}.{path} has no description: Field(..., description='...') is what users read in the schema"
        for path, described in _leaves(config).items()
        if not described
    ]


def _leaves(config: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Returns the dotted name of every field of a section and its nested sections -> whether it has a description."""
    found: dict[str, bool] = {}
    for name, field in config.model_fields.items():
        path = f"{prefix}{name}"
        found[path] = bool(field.description)
        for nested in _sections_in(field.annotation):
            found |= _leaves(nested, f"{path}.")
    return found


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _sections_in(argument)]


def _attribute_problems(cls: type[Any], base: type[Any]) -> list[str]:
    """Returns problems with class attributes that look like misspellings, which would never be read."""
    known = [name for name in {*dir(base), *base.__annotations__} if not name.startswith("_")]
    problems = []
    own = {name: value for k in cls.__mro__ if issubclass(k, base) and k is not base for name, value in vars(k).items()}
    for name, value in own.items():
        if name.startswith("_") or name in known or inspect.isroutine(value):
            continue
        meant = next((word for word in known if _is_slip(name, word)), None)
        if meant is None and isinstance(value, type) and issubclass(value, Section):
            meant = "Config" if "Config" not in own else None
        if meant is not None:
            problems.append(f"{cls.__name__}.{name} is never read. Did you mean '{meant}'?")
    return problems


def _is_slip(name: str, word: str) -> bool:
    """Returns whether two words differ by one letter inserted, removed, replaced, or swapped with its neighbour."""
    left, right = name.lower().replace("_", ""), word.lower().replace("_", "")
    if left == right:
        return True
    if abs(len(left) - len(right)) > 1 or min(len(left), len(right)) < 4:
        return False
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    a, b = left[start:], right[start:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


class _Manager(pluggy.PluginManager):
    """A plugin manager that does not evaluate properties at registration, as pluggy before 1.7 does."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if isinstance(inspect.getattr_static(plugin, name, None), property):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def new_manager() -> pluggy.PluginManager:
    """Returns a plugin manager that knows the contract."""
    manager = _Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _candidates(plugin: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in dir(plugin):
        if name.startswith("__"):
            continue
        # Looked up on the type first, because registering a plugin must not evaluate its properties.
        static = inspect.getattr_static(plugin, name, None)
        if isinstance(static, property):
            continue
        value = getattr(plugin, name, None)
        if inspect.isroutine(value):
            yield name, value


def _defined_here(plugin: object, function: Callable[..., Any]) -> bool:
    # A module may import functions named compress_...; only its own can be meant as hooks.
    return not inspect.ismodule(plugin) or getattr(function, "__module__", None) == plugin.__name__


def _near(name: str, specs: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, specs, n=1)
    return f" Did you mean {close[0]}()?" if close else f" There are: {', '.join(sorted(specs))}."


def _near_word(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _argument_problems(function: Callable[..., Any], allowed: tuple[str, ...], where: str) -> list[str]:
    problems = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            problems.append(f"{where} takes *{parameter.name}, which is never filled; name the arguments that it needs")
        elif parameter.name not in allowed:
            hint = _near_word(parameter.name, allowed) or f" The hook has: {', '.join(allowed) or 'none'}."
            problems.append(f"{where} asks for an argument '{parameter.name}' that the hook does not have.{hint}")
        elif parameter.default is not parameter.empty:
            problems.append(
                f"{where} gives the argument '{parameter.name}' a default, so it would never be passed; remove it"
            )
    return problems
