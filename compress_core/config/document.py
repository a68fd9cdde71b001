"""`CompressionConfig`: a whole config, loaded and validated."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import json5
from pydantic import BeforeValidator, Field, ValidationError

from compress_core.config.accuracy_aware import ADAPTIVE, AccuracyAwareTraining, problems_of_accuracy_aware
from compress_core.config.choices import ChoiceOf
from compress_core.config.errors import problems_of, shown
from compress_core.config.frozen import FrozenDict, frozen, thawed
from compress_core.config.sections import AlgorithmConfig, Count, Scopes, Section
from compress_core.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

Struct = TypeVar("Struct")


def _as_list_of_objects(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


class InputInfo(Section):
    """One tensor argument of the model's forward."""

    sample_size: list[Annotated[Count, Field(ge=1)]] | None = Field(
        None, description="full shape, batch dimension included"
    )
    type: str = Field("float", description="name of a torch dtype, such as float or long")
    filler: Literal["zeros", "ones", "random"] = Field("ones", description="what an example tensor is filled with")
    keyword: str | None = Field(None, description="name of the argument, when it is passed by keyword")


class RootSection(Section):
    """The top-level keys of a config that the core knows, except `compression`."""

    input_info: Annotated[list[InputInfo], BeforeValidator(_as_list_of_objects)] = Field(
        default_factory=list, description="example inputs, one for each argument of forward"
    )
    # The algorithm that reads it says what CPU_SPR, of NNCF, is here.
    target_device: Annotated[str, ChoiceOf("quantization.target_device", also=("CPU_SPR",), lenient=True)] = Field(
        "ANY", description="the runtime and the hardware that the compressed model is meant for"
    )
    compression_lr_multiplier: float | None = Field(
        None, gt=0, description="factor on the gradients of the parameters that algorithms add"
    )
    ignored_scopes: Scopes = Field(default_factory=list, description="parts of the model that no algorithm may touch")
    target_scopes: Scopes = Field(default_factory=list, description="if given, the only parts to compress")
    recompute_weights: bool = Field(
        False,
        description="in training, compute compressed weights again in the backward pass instead of keeping them: less "
        "memory, a little more time",
    )
    accuracy_aware_training: AccuracyAwareTraining | None = Field(
        None, description="what create_accuracy_aware_training_loop does: how much accuracy may be lost, and how long"
    )
    unused_values: Literal["error", "warn"] = Field(
        "error", description="what happens when a value in an algorithm's section can have no effect"
    )
    log_dir: str | None = Field(
        None, description="accepted for compatibility with NNCF, without effect: no logs are written"
    )
    disable_shape_matching: bool | None = Field(
        None, description="accepted for compatibility with NNCF, without effect"
    )
    scopes_without_shape_matching: Scopes | None = Field(
        None, description="accepted for compatibility with NNCF, without effect"
    )

    @property
    def searches_from_the_start(self) -> bool:
        """Whether accuracy-aware training moves a level before any schedule has set one."""
        section = self.unread().accuracy_aware_training
        if section is None or section.mode != ADAPTIVE:
            return False
        return section.params.initial_training_phase_epochs == 0


# Sections of NNCF configs that this version does not support: ignoring them silently would mislead the user.
_REFUSED = {
    "bootstrapNAS": "neural architecture search is not part of compress-core; remove this section",
}


# Keys of NNCF configs that have no effect here: they are accepted with a warning.
_WITHOUT_EFFECT = ("log_dir", "disable_shape_matching", "scopes_without_shape_matching")

# Spellings in NNCF's documentation -> the key that is meant; NNCF itself ignores them without a word.
_OLD_SPELLINGS = {"input_infos": "input_info"}


# Keys of an algorithm's section that users put at the top level by mistake.
_SECTION_KEYS = ("algorithm", "params", "initializer")


# Far from Python's limit of recursion, which checking, copying and printing a document would meet.
_DEEPEST = 64

# Sizes and seeds of torch have 64 bits with their sign.
_MOST_BITS = 63


SectionValidator = Callable[[Any, str, list[Problem]], "AlgorithmConfig | UnresolvedSection | None"]
"""Takes a raw section, its path, and a list to which it adds problems; returns the section, or None if it is wrong."""

# Only the last one is used. The registry knows what is installed; it registers itself, as this layer cannot import it.
_validators: list[SectionValidator] = []


def validate_sections_with(validator: SectionValidator) -> None:
    """Makes `validator` the one that checks the sections of algorithms."""
    _validators.append(validator)


class CompressionConfig:
    """A validated config.

    Sections of installed algorithms are checked when the config is loaded. A section whose algorithm is not installed
    is kept unchecked, so that a config can be read anywhere; `create_compressed_model` refuses it.

    Attributes:
        root: The top-level keys.
        sections: The sections of the algorithms, in the order of the config.
    """

    root: RootSection
    sections: tuple[AlgorithmConfig | UnresolvedSection, ...]

    def __init__(self, document: Mapping[str, Any], *, origin: str = "") -> None:
        if not isinstance(document, Mapping):
            raise ConfigError(f"a config is an object with a key 'compression', got {shown(document)}", path=origin)
        _check_size(document)
        self._source = FrozenDict({str(key): frozen(value) for key, value in document.items()})
        self._structs: dict[type, Any] = {}
        problems: list[Problem] = []
        self.root = _validated_root(self._source, problems)
        self._single = isinstance(self._source.get("compression"), Mapping)
        validate = _validators[-1]
        self.sections = tuple(
            section
            for index, raw in enumerate(_raw_sections(self._source, problems))
            if (section := validate(raw, self.section_path(index), problems)) is not None
        )
        problems.extend(self._repeated())
        if problems:
            raise ConfigError(problems)

    @property
    def source(self) -> dict[str, Any]:
        """A copy of the document as it was given: to change, and to load again."""
        return {key: thawed(value) for key, value in self._source.items()}

    def without_extra_structs(self) -> CompressionConfig:
        """Returns this config without the data and functions that were registered with it."""
        twin = copy.copy(self)
        twin._structs = {}
        return twin

    @classmethod
    def from_json(cls, path: str | Path) -> CompressionConfig:
        """Reads a JSON file; comments and trailing commas are allowed.

        Raises:
            ConfigError: The file cannot be read or parsed, repeats a key, or is not a valid config.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the config '{path}': {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the config '{path}' is not UTF-8 text: {error}") from error
        except ValueError as error:  # a path that no file can have
            raise ConfigError(f"cannot read the config {str(path)!r}: {error}") from error
        try:
            document = _parsed(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the config '{path}' is not JSON: {error}") from error
        return cls(document)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CompressionConfig:
        """Validates a dict; it is not changed, and later changes of it have no effect.

        Raises:
            ConfigError: The dict is not a valid config.
        """
        return cls(document)

    @classmethod
    def load(cls, config: CompressionConfig | Mapping[str, Any] | str | Path) -> CompressionConfig:
        """Returns a config from a config, a dict, or the path of a JSON file."""
        if isinstance(config, CompressionConfig):
            return config
        if isinstance(config, (str, Path)):
            return cls.from_json(config)
        return cls.from_dict(config)

    def register_extra_structs(self, structs: Iterable[object]) -> CompressionConfig:
        """Attaches objects that JSON cannot hold, such as `BNAdaptationInitArgs`.

        An object replaces an earlier one of the same type.

        Returns:
            This config.
        """
        for struct in structs:
            self._structs[type(struct)] = struct
        return self

    def get_extra_struct(self, kind: type[Struct]) -> Struct | None:
        """Returns the attached object of a type, or None."""
        return self._structs.get(kind)

    def extra_structs(self) -> list[Any]:
        """Returns all attached objects."""
        return list(self._structs.values())

    def section_path(self, index: int) -> str:
        """Returns the path of an algorithm's section without the algorithm's name: `compression` or `compression.1`."""
        return "compression" if self._single else f"compression.{index}"

    def algorithm_path(self, index: int) -> str:
        """Returns the path of an algorithm's section with its name: `compression.1.magnitude_sparsity`."""
        return f"{self.section_path(index)}.{self.sections[index].algorithm}"

    def _repeated(self) -> list[Problem]:
        names = [section.algorithm for section in self.sections]
        return [
            Problem(self.algorithm_path(i), "this algorithm is named twice; merge the two sections into one")
            for i, name in enumerate(names)
            if name in names[:i]
        ]


def _parsed(text: str) -> Any:
    """Parses JSON with comments and trailing commas in time proportional to its length.

    The parser of JSON5 needs a second and more for 100 KB, so it sees only what is not JSON without these.
    """
    plain = _TRAILING_COMMA.sub(_string_alone, _COMMENT.sub(_string_alone, text))
    try:
        return json.loads(plain, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError:
        return json5.loads(text, allow_duplicate_keys=False)


# A string, which is kept as it is, or what is removed.
_COMMENT = re.compile(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING_COMMA = re.compile(r'("(?:[^"\\\n]|\\.)*")|,(?=\s*[}\]])')


def _string_alone(match: re.Match[str]) -> str:
    return match.group(1) or " "


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'Duplicate key "{repeated}" found in object')
    return found


def _check_size(document: Mapping[Any, Any]) -> None:
    """Refuses documents that are nested too deeply, and numbers that do not fit in 64 bits; without recursion."""
    pending: list[tuple[Any, tuple[Any, ...]]] = [(document, ())]
    while pending:
        item, place = pending.pop()
        if isinstance(item, int) and not isinstance(item, bool) and item.bit_length() > _MOST_BITS:
            raise ConfigError(
                f"the number does not fit in {_MOST_BITS} bits, it has {item.bit_length()}; give a smaller one",
                path=".".join(map(str, place)),
            )
        if not isinstance(item, (Mapping, list, tuple)):
            continue
        if len(place) > _DEEPEST:
            raise ConfigError(
                f"is nested more than {_DEEPEST} levels deep, which no section is; remove the brackets",
                path=".".join(map(str, place[:5])),
            )
        entries = item.items() if isinstance(item, Mapping) else enumerate(item)
        pending.extend((entry, (*place, key)) for key, entry in entries)


class UnresolvedSection:
    """The section of an algorithm that is not installed, as the user wrote it."""

    def __init__(self, document: Mapping[str, Any], problem: Problem) -> None:
        self.algorithm = str(document["algorithm"])
        self.document = dict(document)
        self.problem = problem


def _raw_sections(source: Mapping[str, Any], problems: list[Problem]) -> list[Any]:
    compression = source.get("compression", [])
    if isinstance(compression, Mapping):
        return [compression]
    if isinstance(compression, list):
        return compression
    problems.append(Problem("compression", f"must be an object or a list of objects, got {shown(compression)}"))
    return []


def _respelled(source: Mapping[str, Any], problems: list[Problem]) -> Mapping[str, Any]:
    """Returns the document with old spellings of keys replaced, and names them in a warning."""
    old = [key for key in _OLD_SPELLINGS if key in source]
    problems.extend(
        Problem(key, f"is an old spelling of '{_OLD_SPELLINGS[key]}', which is there, too; remove one")
        for key in old
        if _OLD_SPELLINGS[key] in source
    )
    if old:
        logger.warning("config: %s", ", ".join(f"'{key}' is read as '{_OLD_SPELLINGS[key]}'" for key in old))
    return {_OLD_SPELLINGS.get(key, key): value for key, value in source.items()}


def _validated_root(source: Mapping[str, Any], problems: list[Problem]) -> RootSection:
    source = _respelled(source, problems)
    known = {**RootSection.model_fields, "compression": None, **_REFUSED}
    strangers = []
    for key in source:
        if key in _REFUSED:
            problems.append(Problem(key, f"{_REFUSED[key]} (value {shown(source[key])})"))
        elif key not in known:
            # Compared in lower case, because COMPRESSION is a misspelling as well.
            close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
            if close or key in _SECTION_KEYS:
                hint = f" Did you mean '{close[0]}'?" if close else " It belongs in 'compression'."
                problems.append(Problem(key, f"unknown key (value {shown(source[key])}).{hint}"))
            else:
                strangers.append(key)
    if strangers:
        logger.warning(
            "config: compress-core does not use the top-level keys %s; they are left to your program",
            ", ".join(strangers),
        )
    if idle := [key for key in _WITHOUT_EFFECT if key in source]:
        logger.warning("config: %s: accepted for compatibility with NNCF, but without effect", ", ".join(idle))
    try:
        root = RootSection.model_validate({key: source[key] for key in source if key in RootSection.model_fields})
        problems.extend(problems_of_accuracy_aware(root.unread().accuracy_aware_training))
        return root
    except ValidationError as error:
        problems.extend(problems_of(error, RootSection, ""))
        return RootSection()
