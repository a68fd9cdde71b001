"""Scopes: how a config names parts of a model.

An entry is one of

* a dotted module name, which means that module and everything below it: `layer1`, `layer1.0.conv1`;
* a glob over dotted names, in which `*` crosses dots: `layer?.*.conv1`;
* `{re}` and a regular expression, searched in the dotted name and in NNCF's node names of the module;
* an NNCF node name, `Model/Sequential[features]/NNCFConv2d[0]/conv2d_0`, of which only the names in brackets are used;
* a call, written as places are printed, `layer1.0/torch.Tensor.add#1`, which means that call alone.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from compress_core.config.patterns import compile_pattern
from compress_core.errors import ConfigError, Problem
from compress_core.transforms.generated import base_class
from compress_core.transforms.layers import weighted_layer

_REGEX_PREFIX = "{re}"
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_NNCF_ATTRIBUTE = re.compile(r"^\w+\[([^\]]+)\]$")


@dataclass(frozen=True)
class ScopedModule:
    """All the names by which a scope can refer to a module.

    Attributes:
        name: Dotted name, empty for the model itself.
        nncf_names: Its node names in NNCF, with and without the prefix `NNCF` of wrapped classes.
    """

    name: str
    nncf_names: tuple[str, ...] = ()


def scoped_modules(model: nn.Module) -> list[ScopedModule]:
    """Returns every module of `model` with its names."""
    addresses: dict[str, tuple[str, str]] = {"": (base_class(model).__name__,) * 2}
    result = []
    for name, module in model.named_modules():
        if name:
            parent, _, attribute = name.rpartition(".")
            plain, wrapped = addresses.get(parent, ("", ""))
            cls = base_class(module).__name__
            prefix = "NNCF" if weighted_layer(type(module)) else ""
            addresses[name] = (f"{plain}/{cls}[{attribute}]", f"{wrapped}/{prefix}{cls}[{attribute}]")
        layer = weighted_layer(type(module))
        suffix = f"/{layer.operator}_0" if layer else ""
        result.append(ScopedModule(name, tuple(dict.fromkeys(address + suffix for address in addresses[name]))))
    return result


def is_of_document(path: str) -> bool:
    """Returns whether a config path is of the example input or of scopes at the top level, for all algorithms."""
    return f"{path}.".startswith(("ignored_scopes.", "target_scopes.", "input_info."))


def compile_scope(entry: str) -> Callable[[ScopedModule], bool]:
    """Returns the function that decides whether a module matches an entry of a scope list.

    Raises:
        ValueError: The entry is empty, or its regular expression does not compile.
    """
    if not entry:
        raise ValueError("a scope must not be empty; name a module, or remove the entry")
    if entry.startswith(_REGEX_PREFIX):
        found = compile_pattern(entry[len(_REGEX_PREFIX) :], prefix=_REGEX_PREFIX)
        return lambda module: any(found(name) for name in (module.name, *module.nncf_names))
    if "/" in entry and "#" in entry:
        return lambda module: entry in (module.name, *module.nncf_names)
    if "/" in entry:
        return _from_nncf(entry)
    if _GLOB_CHARACTERS.search(entry):
        glob = re.compile(fnmatch.translate(entry))
        return lambda module: any(glob.match(name) for name in _with_parents(module.name))
    return _below(entry)


def _below(name: str) -> Callable[[ScopedModule], bool]:
    return lambda module: name in _with_parents(module.name)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _from_nncf(entry: str) -> Callable[[ScopedModule], bool]:
    """Matches `Model/Class[a]/Class[b]`, the module a.b and all below; with an operator at the end, that one alone."""
    path, operator = nncf_address(entry)
    if not operator:
        return _below(path) if path else lambda module: False
    return lambda module: any(nncf_address(name) == (path, operator) for name in module.nncf_names)


@functools.lru_cache(maxsize=1 << 16)  # a document may name each of hundreds of places
def nncf_address(node_name: str) -> tuple[str, str]:
    """Returns the dotted path in a node name of NNCF, and the operator at its end, or an empty string."""
    parts = node_name.split("/")[1:]
    path = ".".join(match.group(1) for part in parts if (match := _NNCF_ATTRIBUTE.match(part)))
    return path, parts[-1] if parts and not _NNCF_ATTRIBUTE.match(parts[-1]) else ""


@dataclass
class ScopeFilter:
    """Decides which modules an algorithm may change: those in the targets (if any are named) and in no ignored scope.

    Args:
        model: The model whose modules are matched.
        ignored: Ignored scopes: config path of an entry -> the entry.
        target: Lists of target scopes, each by config path; a module must match every list that is not empty.

    Raises:
        ConfigError: An entry is empty or not a regular expression.
    """

    model: nn.Module
    ignored: Mapping[str, str] = field(default_factory=dict)
    target: Sequence[Mapping[str, str]] = ()

    def __post_init__(self) -> None:
        self._modules = {module.name: module for module in scoped_modules(self.model)}
        self._predicates: dict[str, Callable[[ScopedModule], bool]] = {}
        self._left: set[str] = set()
        problems = []
        for path, entry in self.entries():
            try:
                self._predicates[entry] = compile_scope(entry)
            except ValueError as error:
                problems.append(Problem(path, str(error)))
        if problems:
            raise ConfigError(problems)

    def add(self, operators: Mapping[str, ScopedModule]) -> None:
        """Adds operators that are not modules, so that entries can refer to them.

        Args:
            operators: The key for `reason_to_skip` and `check` -> the names of the operator. The dotted name of a call
                is below that of its module.
        """
        self._modules |= operators

    def leave(self, entries: Iterable[str]) -> None:
        """Leaves it to the caller to refuse these entries if they match nothing; `check` passes over them."""
        self._left.update(entries)

    def entries(self) -> list[tuple[str, str]]:
        """Returns (config path, entry) for every scope."""
        return [*self.ignored.items(), *(item for entries in self.target for item in entries.items())]

    def matches(self, entry: str) -> list[str]:
        """Returns the dotted names of the modules that match an entry."""
        return [name for name in self._modules if self._matches(entry, name)]

    def reason_to_skip(self, module_names: Iterable[str]) -> str | None:
        """Returns why a tensor that these modules share is skipped, or None when it is a target.

        A shared tensor is ignored if any of its modules is ignored, and a target if any of its modules is a target.
        """
        names = list(module_names)
        for path, entry in self.ignored.items():
            if any(self._matches(entry, name) for name in names):
                return f"ignored by {path} = '{entry}'"
        for entries in self.target:
            if entries and not any(self._matches(entry, name) for entry in entries.values() for name in names):
                return f"not in {_common_path(entries)}"
        return None

    def targeted_by(self, module_names: Iterable[str]) -> list[tuple[str, str]]:
        """Returns (config path, entry) of the target scopes that match one of these modules."""
        names = list(module_names)
        return [
            (path, entry)
            for entries in self.target
            for path, entry in entries.items()
            if any(self._matches(entry, name) for name in names)
        ]

    def dead_entries(self, own: Sequence[str], others: Sequence[str], own_prefix: str = "") -> list[Problem]:
        """Returns a problem for each entry without a match.

        Args:
            own: Dotted names that entries of one section may match.
            others: Dotted names that entries of all other sections may match.
            own_prefix: Config path of that one section.
        """
        problems = []
        for path, entry in self.entries():
            candidates = own if path.startswith(own_prefix) else others
            if entry in self._left or any(self._matches(entry, name) for name in candidates):
                continue
            close = difflib.get_close_matches(entry, candidates, n=1)
            hint = (
                f" Did you mean '{close[0]}'?"
                if close
                else f" The model has, for example, {[c for c in candidates if c][:3]}."
            )
            where = 'set "validate_scopes": false in this section'
            if is_of_document(path):
                where = "move it to the section of the algorithm that it is meant for"
            problems.append(
                Problem(
                    path,
                    f"the scope '{entry}' matches no layer that it could apply to.{hint} Correct it, remove it, "
                    f"or {where}.",
                )
            )
        return problems

    def check(self, own: Sequence[str], others: Sequence[str] = (), own_prefix: str = "") -> None:
        """Raises a ConfigError that names every entry without a match; see `dead_entries`."""
        problems = self.dead_entries(own, others, own_prefix)
        if problems:
            raise ConfigError(problems)

    def _matches(self, entry: str, module_name: str) -> bool:
        module = self._modules.get(module_name)
        return module is not None and self._predicates[entry](module)


def _common_path(entries: Mapping[str, str]) -> str:
    return next(iter(entries)).rpartition(".")[0] or "target_scopes"
