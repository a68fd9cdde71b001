"""Names of quantizers, and the scopes that match them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass

from compress_core import ConfigError
from compress_core.config.patterns import compile_pattern
from compress_core.config.scopes import ScopedModule, ScopeFilter, compile_scope, nncf_address
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
    """Returns the function that matches places against a scope, or against the name of a quantizer with its port.

    All lists of scopes of the section use it, so that a name means the same in each; see `compress_core.config.scopes`.

    Raises:
        ValueError: It is empty or not a regular expression.
    """
    predicate, names_it = compile_scope(entry), quantizer_matcher(entry)
    if has_port(entry):
        return names_it
    # Calls that are no modules have names of NNCF that only equality can mean.
    return lambda place: (
        any(predicate(name) or entry in name.nncf_names for name in (*place.names, *place.readers)) or names_it(place)
    )


def has_port(entry: str) -> bool:
    """Returns whether a scope names a quantizer: ends with |WEIGHT, |OUTPUT or |INPUT<n>."""
    return not _is_regex(entry) and _QUANTIZER.match(entry) is not None


def can_name_quantizer(entry: str) -> bool:
    """Returns whether a scope may be the name of a quantizer: it has a port, or is a regular expression."""
    return _is_regex(entry) or has_port(entry)


def quantizer_matcher(entry: str) -> Callable[[QuantizerPlace], bool]:
    """Returns the function that decides whether a scope is the name of this very quantizer, with its port.

    What stands in front of the port is a whole name, as it is printed or as NNCF has it, or a glob: `first|OUTPUT` is
    the quantizer behind `first` and not those below it, which are `first.*|OUTPUT`. A regular expression names a
    quantizer if it is found in the name with the port and not without; otherwise it means operators.

    Raises:
        ValueError: It is empty or not a regular expression.
    """
    if _is_regex(entry):
        return _found_with_port(compile_pattern(entry[len(_REGEX_PREFIX) :], prefix=_REGEX_PREFIX))
    parts = _QUANTIZER.match(entry)
    if parts is None:
        return lambda place: entry in place.own_names
    scope, port = parts["scope"], parts["port"]
    is_name = _whole_name(scope)
    return lambda place: entry in place.own_names or (place.port == port and any(map(is_name, place.names)))


def _found_with_port(found: Callable[[str], object]) -> Callable[[QuantizerPlace], bool]:
    def is_found(place: QuantizerPlace) -> bool:
        names = [name for scoped in place.names for name in (scoped.name, *scoped.nncf_names)]
        return not any(map(found, names)) and any(found(f"{name}|{place.port}") for name in names)

    return is_found


def _whole_name(scope: str) -> Callable[[ScopedModule], bool]:
    """Returns the function that compares names; classes in NNCF's names do not count, as in other scopes."""
    if "/" not in scope:
        glob = re.compile(fnmatch.translate(scope))
        return lambda name: glob.match(name.name) is not None
    address = nncf_address(scope)
    if "#" in scope or address[1]:
        predicate = compile_scope(scope)
        return lambda name: predicate(name) or scope in name.nncf_names
    return lambda name: name.name == address[0] != ""


def _is_regex(entry: str) -> bool:
    return entry.startswith(_REGEX_PREFIX)


class QuantizersByName:
    """The entries of `ignored_scopes`, at the top level and of the section, that are names of quantizers.

    They are checked separately, because the quantizers are known only after all have been placed.

    Args:
        scopes: The scopes, which leave these entries to this object.

    Attributes:
        entries: Config path -> entry.
        used: Config path -> the quantizers that the entry has named so far.
    """

    def __init__(self, scopes: ScopeFilter) -> None:
        ignored = scopes.ignored.items()
        self.entries = {path: entry for path, entry in ignored if _is_name(entry) or _may_be_name(entry, scopes)}
        self._matchers = {entry: quantizer_matcher(entry) for entry in self.entries.values()}
        self.used: dict[str, list[str]] = {}
        scopes.leave(self.entries.values())
        self._known: dict[str, None] = {}

    def ignoring(self, place: QuantizerPlace) -> str | None:
        """Returns the path of the first entry that is a name of a quantizer, or None; all that are count as used."""
        self._known.update(dict.fromkeys(place.own_names))
        found = [path for path, entry in self.entries.items() if self._matchers[entry](place)]
        for path in found:
            self.used.setdefault(path, []).append(str(place))
        return found[0] if found else None

    def check(self) -> None:
        """Raises a ConfigError that lists every entry that is not the name of a quantizer."""
        problems = []
        for path, entry in self.entries.items():
            if path in self.used:
                continue
            # Another input is not suggested, because it may be the data.
            close = [] if _is_input(entry) else difflib.get_close_matches(entry, self._known, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else "Remove it: controller.statistics() lists the names."
            text = f"'{entry}' is nothing that would be quantized. {hint} {below_hint(entry)}"
            problems.append(Problem(path, text.rstrip()))
        if problems:
            raise ConfigError(problems)


def below_hint(entry: str) -> str:
    """Returns what to write for all quantizers below a module, if an entry may have meant them, or an empty string."""
    parts = None if "/" in entry or _is_regex(entry) else _QUANTIZER.match(entry)
    if parts is None or "*" in entry:
        return ""
    below = f"{parts['scope']}.*|{parts['port']}"
    return f"A name with a port means one quantizer; '{below}' means all below '{parts['scope']}'."


def _may_be_name(entry: str, scopes: ScopeFilter) -> bool:
    """Returns whether a regular expression can only mean quantizers: it has a bar, and no operator matches it."""
    return _is_regex(entry) and "|" in entry and not scopes.matches(entry)


def _is_name(entry: str) -> bool:
    if _is_regex(entry):
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
