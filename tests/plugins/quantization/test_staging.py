"""Staged quantization: groups come on when their epoch comes."""

import json

import pytest

from compress_core import CompressionStage, StateError
from compress_core.contract.clock import Clock
from compress_quantization.config import StagedParams
from compress_quantization.staging import StagedQuantization

NONE, PART, ALL = CompressionStage


def staged(activations=1, weights=1):
    return StagedQuantization(
        StagedParams(activations_quant_start_epoch=activations, weights_quant_start_epoch=weights)
    )


def run(staging, epochs):
    """Returns for each epoch what is turned on, and the stage that is reached."""
    return [(staging.epoch_step(Clock(epoch=epoch)), staging.compression_stage) for epoch in epochs]


def test_defaults_begin_both_groups_in_epoch_one():
    staging = StagedQuantization(StagedParams())
    assert (staging.compression_stage, staging.is_on("weights"), staging.is_on("activations")) == (NONE, False, False)
    assert run(staging, range(3)) == [((), NONE), (("weights", "activations"), ALL), ((), ALL)]


def test_each_group_has_its_own_epoch():
    staging = staged(activations=1, weights=3)
    expected = [((), NONE), (("activations",), PART), ((), PART), (("weights",), ALL), ((), ALL)]
    assert run(staging, range(5)) == expected


def test_a_group_that_begins_at_zero_is_on_at_once_and_not_turned_on_again():
    staging = staged(activations=0, weights=2)
    assert (staging.is_on("activations"), staging.compression_stage) == (True, PART)
    assert run(staging, range(3)) == [((), PART), ((), PART), (("weights",), ALL)]
    assert staged(0, 0).compression_stage == ALL


def test_skipped_epochs_turn_on_what_was_due_and_going_back_turns_nothing_off():
    staging = staged(activations=2, weights=4)
    assert run(staging, [5, 0]) == [(("weights", "activations"), ALL), ((), ALL)]


def test_the_state_is_json_and_resumes():
    staging = staged(activations=1, weights=3)
    run(staging, range(2))
    resumed = staged(activations=1, weights=3)
    resumed.load_state(json.loads(json.dumps(staging.get_state())))
    assert resumed.is_on("activations")
    assert run(resumed, range(2, 5)) == run(staging, range(2, 5)) == [((), PART), (("weights",), ALL), ((), ALL)]


@pytest.mark.parametrize(
    "state", [{}, {"on": None}, {"on": {"weights": True}}, {"on": {"weights": 1, "activations": 0}}]
)
def test_what_is_no_state_is_refused_and_changes_nothing(state):
    staging = staged()
    with pytest.raises(StateError, match=r"staging\.on: must say True or False"):
        staging.load_state(state)
    assert staging.compression_stage == NONE
