"""Places: positions in a model at which an activation can be transformed.

A place identifies a tensor by its role in a forward: as an argument or a result of a module, or of a function that is
called while a module's forward runs. Places can be compared, written as JSON and read back, and they are valid for
every forward of the model, not just for the traced one.

A function may be called several times while a module runs. Calls from the same code position (a loop) are one *site*.
The sites of a function in a module are numbered in the order in which the traced forward reached them. `CallPattern`
says which call belongs to which site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

# The path of a tensor in nested arguments or results: positions in tuples and lists, keys of dicts.
Path: TypeAlias = tuple[int | str, ...]


@dataclass(frozen=True)
class CallPattern:
    """Selects the calls of a function that belong to a site, counted while a module's forward runs.

    Calls by submodules count as well, in the order in which they happen.

    Attributes:
        site: The site to select.
        sites: The site of each call of the traced forward in eval mode.
        training: The same in training mode; None if it makes the same calls.
        counts: Numbers of calls of other traced runs of the module in eval mode, if they made fewer.
        training_counts: The same in training mode.
    """

    site: int
    sites: tuple[int, ...]
    training: tuple[int, ...] | None = None
    counts: tuple[int, ...] = ()
    training_counts: tuple[int, ...] = ()

    def expected(self, *, training: bool) -> tuple[int, ...]:
        """Returns the site of each call that one forward is expected to make."""
        return self.training if training and self.training is not None else self.sites

    def was_traced(self, calls: int, *, training: bool) -> bool:
        """Returns whether a traced run of the module made this number of calls."""
        counts = self.training_counts if training else self.counts
        return calls == len(self.expected(training=training)) or calls in counts

    def includes(self, call: int, *, training: bool) -> bool:
        """Returns whether the call with the index `call` (from 0) belongs to the site.

        A loop may run longer than when it was traced: calls beyond the traced ones continue the repeating pattern at
        the end of the traced sequence.
        """
        expected = self.expected(training=training)
        if call < len(expected):
            return expected[call] == self.site
        period = _period(expected)
        return period > 0 and expected[len(expected) - period + (call - len(expected)) % period] == self.site


def _period(sites: tuple[int, ...]) -> int:
    """Returns the length of the shortest pattern that is repeated at the end of `sites`, or 0 if there is none."""
    for period in range(1, len(sites) // 2 + 1):
        if sites[-period:] == sites[-2 * period : -period]:
            return period
    return 0


@dataclass(frozen=True)
class Place:
    """Base class of the four kinds of places.

    Attributes:
        module: Dotted name of the module; the empty string is the model itself.
    """

    kind: ClassVar[str] = ""
    module: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the place as a JSON-able dict for `place_from_dict`."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class ModuleInput(Place):
    """An argument of a module's forward.

    Attributes:
        argument: First the position or the keyword of the argument, then how to reach a tensor within it.
    """

    kind: ClassVar[str] = "module_input"
    argument: Path = (0,)

    def __str__(self) -> str:
        return f"{self.module or 'model'}: input {_path(self.argument)}"


@dataclass(frozen=True)
class ModuleOutput(Place):
    """The result of a module's forward.

    Attributes:
        item: Path of the tensor in the result; empty for the result itself.
    """

    kind: ClassVar[str] = "module_output"
    item: Path = ()

    def __str__(self) -> str:
        return f"{self.module or 'model'}: output {_path(self.item)}".rstrip()


@dataclass(frozen=True)
class CallInput(Place):
    """An argument of a function that is called while a module's forward runs.

    Attributes:
        function: The function's name, e.g. `torch.cat`; see `torch.overrides.resolve_name`.
        calls: Which of its calls.
        argument: First the position or the keyword of the argument, then how to reach a tensor within it.
    """

    kind: ClassVar[str] = "call_input"
    function: str
    calls: CallPattern
    argument: Path = (0,)

    def __str__(self) -> str:
        return f"{self.module or 'model'}: {self.function}#{self.calls.site} input {_path(self.argument)}"


@dataclass(frozen=True)
class CallOutput(Place):
    """The result of a function that is called while a module's forward runs.

    Attributes:
        function: The function's name, e.g. `torch.nn.functional.relu`; see `torch.overrides.resolve_name`.
        calls: Which of its calls.
        item: Path of the tensor in the result; empty for the result itself.
    """

    kind: ClassVar[str] = "call_output"
    function: str
    calls: CallPattern
    item: Path = field(default=())

    def __str__(self) -> str:
        return f"{self.module or 'model'}: {self.function}#{self.calls.site} output {_path(self.item)}".rstrip()


ActivationPlace: TypeAlias = ModuleInput | ModuleOutput | CallInput | CallOutput
Kind: TypeAlias = Literal["module_input", "module_output", "call_input", "call_output"]
_KINDS: dict[str, type[ModuleInput | ModuleOutput | CallInput | CallOutput]] = {
    cls.kind: cls for cls in (ModuleInput, ModuleOutput, CallInput, CallOutput)
}


def place_from_dict(values: Mapping[str, Any]) -> ActivationPlace:
    """Returns the place for which `Place.to_dict` returned `values`.

    Raises:
        KeyError: The kind is unknown, or a value is missing.
    """
    fields: dict[str, Any] = dict(values)
    cls = _KINDS[fields.pop("kind")]
    for name in ("item", "argument"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if "calls" in fields:
        calls = fields["calls"]
        training = calls.get("training")
        fields["calls"] = CallPattern(
            calls["site"],
            tuple(calls["sites"]),
            None if training is None else tuple(training),
            tuple(calls.get("counts", ())),
            tuple(calls.get("training_counts", ())),
        )
    return cls(**fields)


def _path(path: Path) -> str:
    return ".".join(str(part) for part in path)
