"""Strict registration: what pluggy lets pass, and what would then silently never run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pluggy

from compress_core.contract import hookspecs
from compress_core.errors import PluginError

_MARK = f"{hookspecs.PROJECT}_impl"
_PREFIX = "compress_"


def hook_names() -> dict[str, tuple[str, ...]]:
    """Returns every hook of the contract with the names of its arguments."""
    return {
        name: tuple(inspect.signature(function).parameters)
        for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }


def check_plugin(plugin: object, label: str) -> None:
    """Holds everything about `plugin` that looks like a hook implementation against the contract.

    Args:
        plugin: A module, or an instance.
        label: How messages name it.

    Raises:
        PluginError: It is a class, implements no hook, or an implementation would not be called, or not as it expects.
    """
    if inspect.isclass(plugin):
        raise PluginError(f"{label} is the class {plugin.__name__}; register an instance of it, or a module")
    specs = hook_names()
    implemented = 0
    for name, function in _candidates(plugin):
        options = getattr(function, _MARK, None)
        where = f"{label}: {name}()"
        if options is None:
            if name.startswith(_PREFIX) and name in specs:
                raise PluginError(f"{where} lacks the decorator @hookimpl and would never be called")
            if name.startswith(_PREFIX) and _defined_here(plugin, function):
                raise PluginError(f"{where} looks like a hook, but there is none of that name.{_near(name, specs)}")
            continue
        if options.get("specname"):
            raise PluginError(f"{where} uses specname={options['specname']!r}; name the method like the hook")
        if name not in specs:
            raise PluginError(f"{where} implements a hook that does not exist.{_near(name, specs)}")
        _check_arguments(function, specs[name], where)
        implemented += 1
    if not implemented:
        raise PluginError(f"{label} implements no hook; mark its implementations with @compress_core.hookimpl")


class _Manager(pluggy.PluginManager):
    """Never computes a property because somebody registers a plugin, as pluggy before 1.7 would."""

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
        # Looked up on the type first: a property must not be computed because somebody registers a plugin.
        static = inspect.getattr_static(plugin, name, None)
        if isinstance(static, property):
            continue
        value = getattr(plugin, name, None)
        if inspect.isroutine(value):
            yield name, value


def _defined_here(plugin: object, function: Callable[..., Any]) -> bool:
    # A module may import functions named compress_...; only its own can be meant as hooks.
    return not inspect.ismodule(plugin) or getattr(function, "__module__", None) == plugin.__name__


def _near(name: str, specs: dict[str, tuple[str, ...]]) -> str:
    close = difflib.get_close_matches(name, specs, n=1)
    return f" Did you mean {close[0]}()?" if close else f" There are: {', '.join(sorted(specs))}."


def _check_arguments(function: Callable[..., Any], allowed: tuple[str, ...], where: str) -> None:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PluginError(f"{where} takes *{parameter.name}, which is never filled; name the arguments it needs")
        if parameter.name not in allowed:
            close = difflib.get_close_matches(parameter.name, allowed, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else f" The hook has: {', '.join(allowed) or 'none'}."
            raise PluginError(f"{where} asks for an argument '{parameter.name}' that the hook does not have.{hint}")
        if parameter.default is not parameter.empty:
            raise PluginError(
                f"{where} gives the argument '{parameter.name}' a default, so it would never be passed; remove it"
            )
