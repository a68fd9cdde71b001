"""Choice points, as plugins import them; they live in `config`, whose own fields take choices as well."""

from __future__ import annotations

from compress_core.config.choices import (
    Choice,
    ChoiceOf,
    ChoicePoint,
    ChoiceSource,
    callable_choice,
    choice,
    choices_of,
    find_choice,
    look_up_choices_with,
)

__all__ = [
    "Choice",
    "ChoiceOf",
    "ChoicePoint",
    "ChoiceSource",
    "callable_choice",
    "choice",
    "choices_of",
    "find_choice",
    "look_up_choices_with",
]
