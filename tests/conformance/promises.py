"""Which checks run on what, and which of them may skip themselves."""

from __future__ import annotations

import unittest

# What a check says when it is not for a case: by its tags, or because the other algorithm is in the config already.
NOT_ASKED = ("it is for cases where", "is in the config already")

# What is about an algorithm's own code, whatever the model: two kinds of models are enough.
_OF_ALGORITHMS = (
    "deterministic",
    "flags",
    "statistics",
    "ticks",
    "stage",
    "rate_is",
    "repeats",
    "continues",
    "independent",
    "lets_go",
    "scopes",
    "resumes_on_other",
    "in_place",
    "names",
    "what_it_plans",
)


def on_this_model(model_name, check_name):
    """Tells whether a check runs on a model: every one for what transforms do to models, two for the rest."""
    if "_with_" in check_name:
        return model_name == "resnet"
    return model_name in ("resnet", "transformer") or not any(part in check_name for part in _OF_ALGORITHMS)


def hold(check, case, model_name, may_skip):
    """Runs a check; it may skip itself where it is not asked, or where `may_skip` names model and check."""
    try:
        check(case)
    except unittest.SkipTest as skipped:
        expected = any(reason in str(skipped) for reason in NOT_ASKED) or "expected to fail" in str(skipped)
        assert expected or (model_name, check.__name__) in may_skip, str(skipped)
        raise
