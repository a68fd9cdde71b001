"""The kit itself: tags, expected failures, comparisons, and what its messages are made of."""

from __future__ import annotations

import ast
import inspect
import unittest
from pathlib import Path

import pytest
import torch

import compress_core.testing
from compress_core.registry import use_registry
from compress_core.testing import TAGS, conformance_checks, run_checks, tags_of
from compress_core.testing.outputs import require_close
from tests.testing.clean import Ramp, make_case, registered
from tests.testing.seeded_bugs import CountsItsEpochs

SOURCES = sorted(Path(inspect.getfile(compress_core.testing)).parent.glob("*.py"))


def named(name):
    return next(check for check in conformance_checks() if check.__name__ == name)


@pytest.fixture
def clean():
    with use_registry(registered(Ramp)):
        yield make_case


@pytest.fixture
def counting():
    with use_registry(registered(CountsItsEpochs)):
        yield make_case


def test_tags_are_derived_from_classes_and_cases(clean):
    assert tags_of(clean()) == {"has_loss", "has_statistics", "sparsity"}
    assert tags_of(clean(data=True, tags=["inductor"])) == {
        *("has_loss", "has_statistics", "sparsity", "needs_data", "inductor")
    }


def test_every_declaration_of_a_class_has_a_tag():
    flags = {"replaces_modules": True, "changes_in_place": True, "needs_batch": True, "needs_uncompressed": "creation"}
    with use_registry(registered(type("Declared", (Ramp,), flags))):
        assert set(flags) <= tags_of(make_case())


def test_tags_that_cannot_be_declared_are_refused(clean):
    with pytest.raises(ValueError, match="takes keeps_activations, plans_from_weights, inductor, got has_loss"):
        tags_of(clean(tags=["has_loss"]))


def test_checks_are_chosen_by_tags(clean):
    chosen = {check.__name__ for check in conformance_checks(tags_of(clean()))}
    everything = {check.__name__ for check in conformance_checks()}
    assert everything - chosen == {"check_rolls_back_from_the_loader", "check_inductor_eval", "check_inductor_train"}
    assert "check_resumes_on_other_weights" not in {c.__name__ for c in conformance_checks(["plans_from_weights"])}
    with pytest.raises(ValueError, match="no tag 'sparse'"):
        conformance_checks(["sparse"])


def test_check_that_is_not_for_a_case_says_why(clean):
    with pytest.raises(unittest.SkipTest, match=r"the case has a loader \('needs_data'\)"):
        named("check_rolls_back_from_the_loader")(clean())


def test_expected_failure_is_skipped_with_its_reason(counting):
    case = counting(expected_failures={"check_repeats_an_epoch": "each epoch is a step"})
    with pytest.raises(unittest.SkipTest, match=r"expected to fail: each epoch is a step .*Compute the level from"):
        named("check_repeats_an_epoch")(case)


def test_expected_failure_that_passes_fails(clean):
    case = clean(expected_failures={"check_repeats_an_epoch": "each epoch is a step"})
    with pytest.raises(AssertionError, match=r"each epoch is a step\), and it passes. Remove the declaration"):
        named("check_repeats_an_epoch")(case)


def test_expected_failure_of_a_check_that_there_is_not(clean):
    with pytest.raises(ValueError, match=r"'check_repeat_an_epoch', which is no check. Did you mean"):
        run_checks(clean(expected_failures={"check_repeat_an_epoch": "a slip"}))


def test_report_shows_outcome_and_time(clean):
    report = run_checks(clean(), [named("check_keeps_identity"), named("check_rolls_back_from_the_loader")])
    assert [result.outcome for result in report.results] == ["passed", "skipped"]
    assert "check_keeps_identity" in report.to_str()
    assert report.to_str().endswith(f"2 checks, 0 failed, {sum(r.seconds for r in report.results):.1f} s")


def test_slack_of_rounding_lets_one_step_pass_and_not_two():
    expected = torch.linspace(-1, 1, 255)
    flipped, twice = expected.clone(), expected.clone()
    flipped[3] += 1 / 127
    twice[3] += 2.1 / 127
    require_close(flipped, expected, 1e-4, "it", "Change it.", rounding_step=1 / 127)
    for other in (twice, expected * 1.05, expected.roll(3)):
        with pytest.raises(AssertionError, match=r"^it: the outputs differ by up to .* Change it\."):
            require_close(other, expected, 1e-4, "it", "Change it.", rounding_step=1 / 127)
    with pytest.raises(AssertionError, match="is allowed"):
        require_close(flipped, expected, 1e-4, "it", "Change it.")


def test_shapes_and_numbers_of_outputs_count():
    with pytest.raises(AssertionError, match=r"shapes \(2,\) and \(3,\)"):
        require_close(torch.ones(2), torch.ones(3), 1e-4, "it", "Change it.")


def test_every_failure_says_what_to_change():
    """Nothing in the kit asserts without a sentence: `fail` and `require` take one, and it is one."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Assert):
                assert "for the type checker" in source.read_text().splitlines()[node.lineno - 1], (source, node.lineno)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("fail", "require"):
                remedy = node.args[-1]
                literal = remedy.value if isinstance(remedy, ast.Constant) else "."
                assert literal.endswith("."), (source, node.lineno)


def test_tags_of_checks_are_tags():
    for check in conformance_checks():
        assert {*check.needs, *check.without} <= TAGS.keys()
