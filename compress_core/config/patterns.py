"""Regular expressions of scopes, matched in linear time.

A config may come from a stranger, and Python's matcher tries an exponential number of ways for a pattern such as
`(a+)+$`: it would hang, and it cannot be interrupted, because it holds Python's lock. Here all ways are followed at
once, one character after the other (K. Thompson, "Regular expression search algorithm", 1968), so that the work is at
most the length of the name times that of the pattern. Only whether a name matches is asked, so greediness has no
effect.

What such a matcher cannot do, lookaround, references to groups and case folding, Python's own does, for patterns in
which no repetition is nested and few follow one another.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

# Python offers no public parser of patterns. The tests compare the matcher with `re`, and so find a change of it.
_parser: Any = importlib.import_module("re._parser")
_codes: Any = importlib.import_module("re._constants")

_LONGEST_PATTERN = 2000
_DEEPEST_PATTERN = 50
_MOST_STEPS = 5000
_MOST_REPETITIONS = 4
# From this number on, a repetition counts as one without an end.
_MANY = 10

_WORD, _DIGIT, _SPACE = re.compile(r"\w"), re.compile(r"\d"), re.compile(r"\s")
_OTHER_FLAGS = re.IGNORECASE | re.MULTILINE | re.ASCII | re.LOCALE


def _depth(text: str) -> int:
    """Returns how deeply groups are nested, those of brackets and after backslashes not counted."""
    depth = deepest = 0
    for sign in re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", text, flags=re.DOTALL):
        depth += (sign == "(") - (sign == ")")
        deepest = max(deepest, depth)
    return deepest


class _NotLinearError(Exception):
    """The pattern has a part that needs backtracking."""


def compile_pattern(text: str, prefix: str = "") -> Callable[[str], bool]:
    """Returns the function that decides whether a pattern is found anywhere in a name, as `re.search` does.

    Args:
        text: The pattern.
        prefix: What stands before it in the config, for messages.

    Raises:
        ValueError: The text is no regular expression, or one that could take forever.
    """
    if len(text) > _LONGEST_PATTERN:
        raise ValueError(
            f"a regular expression of a scope has at most {_LONGEST_PATTERN} characters, this one has {len(text)}; "
            "split it into several scopes"
        )
    # Where Python's own limit is depends on what has been imported: some compilers raise it.
    if _depth(text) > _DEEPEST_PATTERN:
        raise ValueError(f"'{prefix}{text[:40]}...' is nested too deeply for a regular expression")
    try:
        pattern, tree = re.compile(text), _parser.parse(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"'{prefix}{text}' is not a regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError(f"'{prefix}{text[:40]}...' is nested too deeply for a regular expression") from error
    try:
        if tree.state.flags & _OTHER_FLAGS:
            raise _NotLinearError
        return _Matcher(tree).found_in
    except _NotLinearError:
        if _may_explode(tree):
            raise ValueError(
                f"'{prefix}{text}' could take forever on a long name: one with lookaround, references to groups or "
                f"flags may not repeat what repeats or has alternatives, nor have more than {_MOST_REPETITIONS} "
                "repetitions in a row; write it without these, or as several scopes"
            ) from None
        return lambda name: pattern.search(name) is not None


class _Matcher:
    """Follows all ways through a pattern at once.

    The program is a list of steps: (predicate, next) reads a character, (None, nexts) goes on in several ways, and
    (code, next) with a code of Python's is a condition on the position. The last step is the end.
    """

    def __init__(self, tree: Any) -> None:
        self._steps: list[tuple[Any, Any]] = []
        self._add(tree)
        self._end = len(self._steps)

    def found_in(self, name: str) -> bool:
        """Returns whether the pattern is found anywhere in `name`."""
        active: set[int] = set()
        for position in range(len(name) + 1):
            reached = self._reached({*active, 0}, name, position)
            if self._end in reached:
                return True
            if position < len(name):
                char = name[position]
                active = {
                    self._steps[at][1] for at in reached if callable(self._steps[at][0]) and self._steps[at][0](char)
                }
        return False

    def _reached(self, starts: set[int], name: str, position: int) -> set[int]:
        """Returns all steps that can be reached without reading a character."""
        seen, pending = set(starts), list(starts)
        while pending:
            at = pending.pop()
            if at == self._end:
                continue
            kind, following = self._steps[at]
            if kind is None:
                ways = following
            elif callable(kind):
                ways = ()
            else:
                ways = (following,) if _holds(kind, name, position) else ()
            fresh = [way for way in ways if way not in seen]
            seen.update(fresh)
            pending.extend(fresh)
        return seen

    def _add(self, tree: Any) -> None:
        for code, argument in tree:
            if len(self._steps) > _MOST_STEPS:
                raise ValueError(
                    f"a regular expression of a scope may not repeat so much ({_MOST_STEPS} steps); use * or +"
                )
            if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
                self._add_repetition(*argument)
            elif code is _codes.BRANCH:
                self._add_branches(argument[1])
            elif code is _codes.SUBPATTERN and not (argument[1] or argument[2]):
                self._add(argument[3])
            elif code is _codes.AT:
                self._steps.append((argument, len(self._steps) + 1))
            else:
                self._steps.append((_predicate(code, argument), len(self._steps) + 1))

    def _add_repetition(self, least: int, most: Any, tree: Any) -> None:
        for _ in range(least):
            before = len(self._steps)
            self._add(tree)
            if len(self._steps) == before:
                break  # it reads nothing
        if most is _codes.MAXREPEAT:
            fork = len(self._steps)
            self._steps.append((None, ()))
            self._add(tree)
            self._steps.append((None, (fork,)))
            self._steps[fork] = (None, (fork + 1, len(self._steps)))
            return
        forks = []
        for _ in range(most - least):
            forks.append(len(self._steps))
            self._steps.append((None, ()))
            self._add(tree)
            if len(self._steps) == forks[-1] + 1:
                break
        for fork in forks:
            self._steps[fork] = (None, (fork + 1, len(self._steps)))

    def _add_branches(self, trees: Any) -> None:
        fork, ends, starts = len(self._steps), [], []
        self._steps.append((None, ()))
        for tree in trees:
            starts.append(len(self._steps))
            self._add(tree)
            ends.append(len(self._steps))
            self._steps.append((None, ()))
        self._steps[fork] = (None, tuple(starts))
        for end in ends:
            self._steps[end] = (None, (len(self._steps),))


def _predicate(code: Any, argument: Any) -> Callable[[str], bool]:
    if code is _codes.ANY:
        return lambda char: char != "\n"
    if code in (_codes.LITERAL, _codes.NOT_LITERAL):
        wanted = chr(argument)
        return lambda char: (char == wanted) == (code is _codes.LITERAL)
    if code is _codes.RANGE:
        low, high = map(chr, argument)
        return lambda char: low <= char <= high
    if code is _codes.CATEGORY:
        name = str(argument).lower()
        kind = _WORD if name.endswith("word") else _DIGIT if name.endswith("digit") else _SPACE
        return lambda char: (kind.match(char) is None) == ("_not_" in name)
    if code is _codes.IN:
        negated = argument[0][0] is _codes.NEGATE
        members = [_predicate(*item) for item in (argument[1:] if negated else argument)]
        return lambda char: any(member(char) for member in members) != negated
    raise _NotLinearError


def _holds(code: Any, name: str, position: int) -> bool:
    if code in (_codes.AT_BEGINNING, _codes.AT_BEGINNING_STRING):
        return position == 0
    if code is _codes.AT_END:
        return position == len(name) or (position == len(name) - 1 and name[position] == "\n")
    if code is _codes.AT_END_STRING:
        return position == len(name)
    around = [bool(_WORD.match(char)) for char in (name[position - 1 : position], name[position : position + 1])]
    return (around[0] != around[1]) == (code is _codes.AT_BOUNDARY)


def _may_explode(tree: Any) -> bool:
    """Returns whether backtracking could take more than a small power of the length of a name."""
    counts = [0]
    found = _walk(tree, counts, repeated=False)
    return found or counts[0] > _MOST_REPETITIONS


def _walk(tree: Any, counts: list[int], *, repeated: bool) -> bool:
    for code, argument in tree:
        if str(code).endswith("_REPEAT"):
            many = argument[1] >= _MANY
            counts[0] += many
            if (repeated and argument[1] > 1) or _walk(argument[2], counts, repeated=repeated or argument[1] > 1):
                return True
        elif code is _codes.BRANCH:
            if repeated or any(_walk(branch, counts, repeated=repeated) for branch in argument[1]):
                return True
        elif code in (_codes.ASSERT, _codes.ASSERT_NOT):
            own = [0]  # a lookaround is left once it has matched, so its repetitions do not multiply with the others
            if _walk(argument[1], own, repeated=repeated) or own[0] > _MOST_REPETITIONS:
                return True
        elif code in (_codes.SUBPATTERN, _codes.ATOMIC_GROUP, _codes.GROUPREF_EXISTS):
            parts = argument if isinstance(argument, (tuple, list)) else [argument]
            inner = (
                [argument] if code is _codes.ATOMIC_GROUP else [p for p in parts if isinstance(p, _parser.SubPattern)]
            )
            if any(_walk(part, counts, repeated=repeated) for part in inner):
                return True
    return False
