"""Which layers of the student learn from which layers of the teacher."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compress_core import ConfigError
from compress_core.config.patterns import compile_pattern
from compress_core.transforms import module_names
from compress_knowledge_distillation.config import FeaturePair

_REGEX = "{re}"


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student and the layer of the teacher that it learns from.

    Attributes:
        student: Dotted name.
        teacher: Dotted name.
        entry: Index in `features`.
    """

    student: str
    teacher: str
    entry: int


def matching(entries: Sequence[str], names: Sequence[str], path: str) -> list[str]:
    """Returns the names that a list of patterns means: in the order of the list, and below that of the model.

    Raises:
        ConfigError: A pattern is no regular expression or matches nothing, or two of them match the same layer.
    """
    found: list[str] = []
    for number, entry in enumerate(entries):
        place = f"{path}.{number}"
        matches = _predicate(entry, place)
        here = [name for name in names if matches(name)]
        if not here:
            close = difflib.get_close_matches(entry, names, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(names[:8])}"
            raise ConfigError(f"'{entry}' is the name of no layer.{hint}", path=place)
        twice = [name for name in here if name in found]
        if twice:
            raise ConfigError(f"'{entry}' matches '{twice[0]}', which an entry before it does, too", path=place)
        found += here
    if not found:
        raise ConfigError("names no layer; name one, or remove this entry of features", path=path)
    return found


def _predicate(entry: str, path: str) -> Callable[[str], bool]:
    if entry.startswith(_REGEX):
        try:
            return compile_pattern(entry[len(_REGEX) :], prefix=_REGEX)
        except ValueError as error:
            raise ConfigError(str(error), path=path) from error
    patterns = entry.split(".")

    def matches(name: str) -> bool:
        parts = name.split(".")
        return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))

    return matches


def paired(pairs: Sequence[FeaturePair], students: Sequence[Sequence[str]], teacher: nn.Module) -> list[LayerPair]:
    """Returns the pairs of layers.

    Args:
        pairs: The entries of `features`.
        students: For each entry the layers of the student.
        teacher: The teacher.

    Raises:
        ConfigError: A layer of the teacher is missing, there are more of one side than of the other, or a pair is named
            twice for the same loss.
    """
    names, found = module_names(teacher), []
    kinds: set[tuple[str, str, str]] = set()
    for number, (pair, own) in enumerate(zip(pairs, students, strict=True)):
        path = f"features.{number}"
        if pair.teacher is None:
            missing = [name for name in own if name not in names]
            if missing:
                raise ConfigError(
                    f"the teacher has no layer '{missing[0]}'; say which of its layers it learns from: teacher",
                    path=f"{path}.student",
                )
            others: Sequence[str] = own
        else:
            others = matching(pair.teacher, names, f"{path}.teacher")
        if len(own) != len(others):
            raise ConfigError(
                f"names {len(others)} layers ({', '.join(others[:5])}) and student {len(own)} ({', '.join(own[:5])}); "
                "each layer of the student learns from one",
                path=f"{path}.teacher",
            )
        for student, other in zip(own, others, strict=True):
            if (student, other, pair.type) in kinds:
                raise ConfigError(f"'{student}' learns from '{other}' twice in the same way", path=path)
            kinds.add((student, other, pair.type))
            found.append(LayerPair(student, other, number))
    return found
