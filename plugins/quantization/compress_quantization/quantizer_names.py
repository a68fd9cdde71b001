"""Names of quantizers, and the scopes that match them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from compress_core import ConfigError
from compress_core.config.patterns import compile_pattern
from compress_core.config.scopes import ScopedModule, ScopeFilter, compile_scope
from compress_core.errors import Problem
from compress_core.transforms.places import ActivationPlace
from compress_quantization.config import QuantizerGroup

_QUANTIZER = re.compile(r"^(?P<scope>.+)\|(?P<port>WEIGHT|OUTPUT|INPUT\d*|GATE)$")
_REGEX_PREFIX = "{re}"
_NNCF_INPUT = "/nncf_model_input_"


@dataclass(frozen=True)
class QuantizerPlace:
    """The position of a quantizer, on which its settings depend.

    Attributes:
        names: The names that scopes can use for it: those of the modules that share the weight, or of the modules and
            calls at an activation. A call that is not a module has a name below that of its module, and its NNCF name.
        group: Whether it is for weights or for activations.
        operator: Kind of its operator (`compress_quantization.profiles`).
        port: `WEIGHT`, `OUTPUT` or `INPUT<n>`, as NNCF names it; `GATE` for that of an activation function.
        depthwise: Whether the operator is a depthwise convolution.
        first_layer: Whether the operator is the first convolution that an input of the model reaches.
        readers: The names of modules that read what is quantized; scopes without a port can mean them as well.
    """

    names: tuple[ScopedModule, ...]
    group: QuantizerGroup
    operator: str
    port: str
    depthwise: bool = False
    first_layer: bool = False
    readers: tuple[ScopedModule, ...] = ()

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names of this quantizer alone: its printed name; for calls and inputs, also the name without the port."""
        first = self.names[0] if self.names else ScopedModule(self.operator)
        return (str(self), *(first.nncf_names if "/" in first.name else ()))

    def __str__(self) -> str:
        return f"{self.names[0].name if self.names else self.operator}|{self.port}"


def scope_matcher(entry: str) -> Callable[[QuantizerPlace], bool]:
    """Returns the function that matches places against a scope, or against NNCF's name of a quantizer with its port.

    All lists of scopes of the section use it, so that a name means the same in each; see `compress_core.config.scopes`.

    Raises:
        ValueError: It is empty or not a regular expression.
    """
    if is_nncf_name(entry):
        return quantizer_matcher(entry)
    predicate = compile_scope(entry)
    # Calls that are no modules have names of NNCF that only equality can mean.
    return lambda place: any(predicate(name) or entry in name.nncf_names for name in (*place.names, *place.readers))


def has_port(entry: str) -> bool:
    """Returns whether a scope names a quantizer: ends with |WEIGHT, |OUTPUT or |INPUT<n>."""
    return not entry.startswith(_REGEX_PREFIX) and _QUANTIZER.match(entry) is not None


def is_nncf_name(entry: str) -> bool:
    """Returns whether a scope is NNCF's name of a quantizer, which means that one alone, as a printed name does."""
    return has_port(entry) and "/" in entry


def quantizer_matcher(entry: str) -> Callable[[QuantizerPlace], bool]:
    """Returns the function that matches places against a scope with a port.

    A regular expression is searched in names with their port.

    Raises:
        ValueError: The scope has no port, is empty, or is not a valid regular expression.
    """
    if entry.startswith(_REGEX_PREFIX):
        compile_scope(entry)
        found = compile_pattern(entry[len(_REGEX_PREFIX) :], prefix=_REGEX_PREFIX)
        return lambda place: any(
            found(f"{name}|{place.port}") for scoped in place.names for name in (scoped.name, *scoped.nncf_names)
        )
    parts = _QUANTIZER.match(entry)
    if parts is None:
        raise ValueError(f"'{entry}' names no quantizer: it must end with |WEIGHT, |OUTPUT or |INPUT<n>")
    scope, port = parts["scope"], parts["port"]
    predicate = compile_scope(scope)
    return lambda place: place.port == port and any(predicate(name) or scope in name.nncf_names for name in place.names)


class QuantizersByName:
    """The entries of `ignored_scopes`, at the top level and of the section, that are names of quantizers.

    They are checked separately, because the quantizers are known only after all have been placed.

    Args:
        scopes: The scopes; these names are added to them, so that their own check passes.
    """

    def __init__(self, scopes: ScopeFilter) -> None:
        self.entries = {path: entry for path, entry in scopes.ignored.items() if _is_name(entry)}
        self._matchers = {entry: scope_matcher(entry) for entry in self.entries.values() if is_nncf_name(entry)}
        self._used: set[str] = set()
        scopes.add({entry: ScopedModule(entry, (entry,)) for entry in self.entries.values()})
        self._known: dict[str, None] = {}

    def ignoring(self, place: QuantizerPlace) -> str | None:
        """Returns the path of the first entry that is a name of a quantizer, or None; all that are count as used."""
        names = place.own_names
        self._known.update(dict.fromkeys(names))
        found = [path for path, entry in self.entries.items() if entry in names or self._matches(entry, place)]
        self._used.update(self.entries[path] for path in found)
        return found[0] if found else None

    def _matches(self, entry: str, place: QuantizerPlace) -> bool:
        return entry in self._matchers and self._matchers[entry](place)

    def check(self) -> None:
        """Raises a ConfigError that lists every entry that is not the name of a quantizer."""
        problems = []
        for path, entry in self.entries.items():
            if entry in self._used:
                continue
            # Another input is not suggested, because it may be the data.
            close = [] if _is_input(entry) else difflib.get_close_matches(entry, self._known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else "Remove it: controller.statistics() lists the names."
            problems.append(Problem(path, f"'{entry}' is nothing that would be quantized. {hint}"))
        if problems:
            raise ConfigError(problems)


def _is_name(entry: str) -> bool:
    if entry.startswith(_REGEX_PREFIX):
        return False
    return ("/" in entry and "#" in entry) or _is_input(entry) or _QUANTIZER.match(entry) is not None


def _is_input(entry: str) -> bool:
    return "/input " in entry or entry.startswith(_NNCF_INPUT)


def nncf_input(number: int) -> str:
    """Returns NNCF's name of an input of the model."""
    return f"{_NNCF_INPUT}{number}"


def place_name(place: ActivationPlace) -> str:
    """Returns the name of a place within names of quantizers, which is shorter than the printed place."""
    text = str(place)
    return text.replace(": output", "").replace(" output", "").replace(": ", "/").replace("torch.nn.functional.", "")
