"""How the hooks of one model are called: who is asked, and who is named when something goes wrong.

A plugin manager of its own holds the algorithm instances of the model, so that what is installed is not what is active.
Calls for one algorithm leave out all other algorithms: a result or an error belongs to somebody.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import pluggy
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.context import Context
from compress_core.contract.initializer import Initializer
from compress_core.errors import PluginError
from compress_core.registry import PluginInfo
from compress_core.registry.checks import check_plugin, new_manager


class HookCalls:
    """Calls hooks of algorithms and initializers.

    Args:
        context: What the hooks are told.
        observers: Further plugin objects that are active for this model alone; they see every algorithm's calls.

    Attributes:
        context: What the hooks are told.
        origins: Name of an algorithm or initializer -> the plugin that it comes from.
        algorithms: The algorithms, in pipeline order.
        initializers: The shared initializers by name, in the order in which they run.

    Raises:
        PluginError: An observer breaks the contract.
    """

    def __init__(self, context: Context, observers: Iterable[object] = ()) -> None:
        self.context = context
        self.origins: dict[str, PluginInfo] = {}
        self.algorithms: list[Algorithm] = []
        self.initializers: dict[str, Initializer] = {}
        self._made: pluggy.PluginManager | None = None
        self._callers: dict[tuple[str, str], Callable[..., Sequence[Any]]] = {}
        if isinstance(observers, nn.Module) or not isinstance(observers, Iterable):
            raise PluginError(f"observers must be a list of plugin objects, got {type(observers).__name__}")
        self._observers = list(observers)
        for observer in self._observers:
            check_plugin(observer, f"observer {type(observer).__name__}")

    def __getstate__(self) -> dict[str, Any]:
        # A copy calls its own algorithms; what pluggy holds can be neither copied nor pickled, and is made again.
        return {**self.__dict__, "_made": None, "_callers": {}, "_observers": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        twin._observers = self._observers  # which are the user's, and are told the model with each call
        return twin

    @property
    def _manager(self) -> pluggy.PluginManager:
        if self._made is None:
            self._made = new_manager()
            for observer in self._observers:
                self._made.register(observer)
            instances: list[Algorithm | Initializer] = [*self.algorithms, *self.initializers.values()]
            for instance in instances:
                self._made.register(instance, name=instance.name)
        return self._made

    def _call(self, hook: str, algorithm: Algorithm, **arguments: Any) -> Sequence[Any]:
        key = (hook, algorithm.name)
        caller = self._callers.get(key)
        if caller is None:
            caller = self._callers[key] = self._caller(hook, algorithm)
        try:
            result: Sequence[Any] = caller(algorithm=algorithm, context=self.context, **arguments)
        except BaseException as error:
            self._attribute(error, hook, algorithm.name)
            raise
        return result

    def _caller(self, hook: str, algorithm: Algorithm) -> Callable[..., Sequence[Any]]:
        """Returns what calls a hook of one algorithm, and of the observers.

        Made once for each: in a training step making it would cost more than calling it (`benchmarks/hook_cost.py`).
        A single plain implementation, the usual case, is called without pluggy, which takes twice as long.
        """
        others: list[object] = [other for other in self.algorithms if other is not algorithm]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        found = caller.get_hookimpls()
        if not found:
            return lambda **arguments: ()
        if len(found) > 1 or found[0].hookwrapper or found[0].wrapper:
            return caller
        function, names = found[0].function, found[0].argnames

        def call(**arguments: Any) -> Sequence[Any]:
            result = function(*[arguments[name] for name in names])
            return () if result is None else (result,)

        return call

    def _call_initializers(self, hook: str, model: nn.Module) -> None:
        """Calls the observers once, then one initializer after the other."""
        groups: dict[str, object] = {"an observer": None, **self.initializers}
        for name, member in groups.items():
            active = self._observers if member is None else [member]
            others = [plugin for plugin in self._manager.get_plugins() if not any(plugin is a for a in active)]
            with self._attributed(hook, name):
                self._manager.subset_hook_caller(hook, remove_plugins=others)(model=model, context=self.context)

    def _optional(self, hook: str, algorithm: Algorithm, kind: Any, **arguments: Any) -> Any:
        results = self._call(hook, algorithm, **arguments)
        who = f"{hook}() of {self.who(algorithm)}"
        if len(results) > 1:
            raise PluginError(f"{who} and an observer both returned a value; an observer must return None")
        if results and not isinstance(results[0], kind):
            raise PluginError(f"{who} returned a {type(results[0]).__name__}, not a {kind.__name__}")
        return results[0] if results else None

    def _one(self, hook: str, algorithm: Algorithm, kind: type[Any], **arguments: Any) -> Any:
        result = self._optional(hook, algorithm, kind, **arguments)
        if result is None:
            raise PluginError(f"{hook}() of {self.who(algorithm)} returned nothing; it needs a {kind.__name__}")
        return result

    def implements(self, hook: str, algorithm: Algorithm) -> bool:
        """Returns whether an algorithm itself implements a hook."""
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        return any(implementation.plugin is algorithm for implementation in implementations)

    def who(self, algorithm: Algorithm) -> str:
        """Returns how messages name an algorithm: with the plugin that it comes from."""
        return f"the algorithm '{algorithm.name}' ({self.origins[algorithm.name]})"

    @contextlib.contextmanager
    def _attributed(self, hook: str, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._attribute(error, hook, name)
            raise

    def _attribute(self, error: BaseException, hook: str, name: str) -> None:
        origin = self.origins.get(name)
        error.add_note(f"raised in {hook}() of '{name}'" + (f", {origin}" if origin else ""))
