"""Places: where in a model an activation can be transformed.

A place names a tensor by how it comes about in a forward: as an argument or a result of a module, or of a function
that is called while a module's forward runs. Places are values: they can be compared, written as JSON and read back,
and they hold for every forward of the model, not for the one that was traced.

A function may be called several times while a module runs. Calls that stand at one line of code (a loop) are one
*site*; the sites of a function below a module are numbered in the order in which the traced forward reached them.
`CallPattern` says which call belongs to which site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

# How to reach a tensor in nested arguments or results: positions in tuples and lists, keys of dicts.
Path: TypeAlias = tuple[int | str, ...]


@dataclass(frozen=True)
class CallPattern:
    """Which calls of a function, counted while a module's forward runs, belong to a site.

    Calls in modules below count as well, in the order in which they happen.

    Attributes:
        site: The site that is meant.
        sites: The site of each call that the traced forward made, in eval mode.
        training: The same in training mode, where the forward may make other calls; None when they are the same.
        counts: How many calls other traced runs of the module made, in eval mode, if fewer.
        training_counts: The same in training mode.
    """

    site: int
    sites: tuple[int, ...]
    training: tuple[int, ...] | None = None
    counts: tuple[int, ...] = ()
    training_counts: tuple[int, ...] = ()

    def expected(self, *, training: bool) -> tuple[int, ...]:
        """Returns the sites of the calls of one forward."""
        return self.training if training and self.training is not None else self.sites

    def was_traced(self, calls: int, *, training: bool) -> bool:
        """Tells whether a traced run of the module made this many calls."""
        counts = self.training_counts if training else self.counts
        return calls == len(self.expected(training=training)) or calls in counts

    def includes(self, call: int, *, training: bool) -> bool:
        """Tells whether the call number `call` (from 0) belongs to the site.

        A loop may run longer than it did when it was traced: calls beyond the traced ones go on as the end of the
        traced sequence repeats itself.
        """
        expected = self.expected(training=training)
        if call < len(expected):
            return expected[call] == self.site
        period = _period(expected)
        return period > 0 and expected[len(expected) - period + (call - len(expected)) % period] == self.site


def _period(sites: tuple[int, ...]) -> int:
    """Returns the length of the shortest pattern that the end of `sites` repeats at least once, or 0."""
    for period in range(1, len(sites) // 2 + 1):
        if sites[-period:] == sites[-2 * period : -period]:
            return period
    return 0


@dataclass(frozen=True)
class Place:
    """Base of the four kinds.

    Attributes:
        module: Dotted name of the module; the empty string is the model itself.
    """

    kind: ClassVar[str] = ""
    module: str

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values for `place_from_dict`."""
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
    """What a module's forward returns.

    Attributes:
        item: How to reach the tensor in it; empty for the result itself.
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
    """What a function returns that is called while a module's forward runs.

    Attributes:
        function: The function's name, e.g. `torch.nn.functional.relu`; see `torch.overrides.resolve_name`.
        calls: Which of its calls.
        item: How to reach the tensor in the result; empty for the result itself.
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
    """Returns the place that `Place.to_dict` described.

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
