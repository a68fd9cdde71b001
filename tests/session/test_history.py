"""The history of a training: what was measured after each epoch, and what the loop has said about it."""

import copy
import json
import math
import pickle

import pytest
import torch

from compress_core import StateError, UsageError, create_compressed_model, hookimpl, load_checkpoint, save_checkpoint
from compress_core.testing import fingerprint
from tests.session.checkpoint_helpers import SETS, SPARSITY, Net, Training, seed

LEVEL = "magnitude_sparsity/sparsity_level"


def levels(controller):
    return [row.measured[LEVEL] for row in controller.history]


def zeros(model):
    weights = [module.weight for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)


def test_each_row_is_what_its_epoch_has_trained():
    seed(1)
    training = Training([SPARSITY])
    expected = [zeros(training.controller.strip())]
    for _ in range(3):
        training.run(1)
        expected.append(zeros(training.controller.strip()))
    rows = training.controller.history
    assert [(row.epochs, row.steps) for row in rows] == [(0, 0), (1, 4), (2, 8), (3, 12)]
    assert levels(training.controller) == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == 4 - 1  # the schedule begins at its first level, which the model has before it
    assert [row.measured["compression_rate"] for row in rows] == pytest.approx(expected, abs=1e-9)


def test_the_last_row_is_the_model_as_it_is_now():
    controller, _ = create_compressed_model(Net(), {"compression": {"algorithm": "magnitude_sparsity"}})
    controller.scheduler.epoch_step()
    controller.set_sparsity_level(0.75)
    assert levels(controller)[-1] == pytest.approx(0.75, abs=1e-3)
    assert levels(controller)[0] == 0
    controller.set_sparsity_level(0.25)
    assert [row.epochs for row in controller.history] == [0, 1]
    assert levels(controller)[-1] == pytest.approx(0.25, abs=1e-3)


def test_what_the_loop_gives_stays_with_its_epoch():
    seed(1)
    training = Training([SPARSITY])
    for loss in (3.0, torch.tensor([2.0]), 1):
        training.run(1)
        row = training.controller.log_epoch(loss=loss)
        assert row.values["loss"] == float(loss)
        training.controller.log_epoch(**{"val/accuracy": float("nan")})
    rows = training.controller.history
    assert [row.given.get("loss") for row in rows] == [None, 3.0, 2.0, 1]
    assert all(math.isnan(row.given["val/accuracy"]) for row in rows[1:])
    saved = json.loads(json.dumps(training.controller.get_compression_state()))["history"]
    assert saved["given"]["loss"] == [None, 3.0, 2.0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "low"}, "'loss' must be a number, or a tensor of one, got 'low'"),
        ({"loss": True}, "'loss' must be a number"),
        ({"loss": None}, "'loss' must be a number"),
        ({"loss": 1j}, "'loss' must be a number"),
        ({"loss": 10**400}, "'loss' is larger than any floating-point number"),
        ({"loss": torch.zeros(3)}, r"'loss' must be a number, or a tensor of one, got a tensor of shape \(3,\)"),
        ({"loss": 1.0, "compression_rate": 0.5}, "'compression_rate' is measured"),
        ({LEVEL: 0.5}, f"'{LEVEL}' is measured"),
        ({"epochs": 2}, "'epochs' is measured"),
    ],
)
def test_what_is_no_number_is_refused_and_nothing_is_recorded(values, message):
    controller, _ = create_compressed_model(Net(), {"compression": {"algorithm": "magnitude_sparsity"}})
    controller.scheduler.epoch_step()
    before = controller.history
    with pytest.raises(UsageError, match=message):
        controller.log_epoch(**values)
    assert controller.history == before


@pytest.mark.parametrize("algorithms", SETS.values(), ids=SETS)
def test_is_saved_and_goes_on(algorithms, tmp_path):
    seed(1)
    training = Training(algorithms)
    training.run(2)
    training.controller.log_epoch(loss=0.5)
    save_checkpoint(tmp_path / "run.pt", training.controller, **training.parts)
    before = training.controller.history
    training.run(1)
    whole = training.controller.history
    load_checkpoint(tmp_path / "run.pt", training.controller, **training.parts)
    assert training.controller.history == before
    training.run(1)
    assert training.controller.history == whole
    state = training.controller.get_compression_state()
    fresh = Training(algorithms, state=state)
    assert fresh.controller.history[:-1] == whole[:-1]
    assert fresh.controller.get_compression_state()["history"] == state["history"]


def test_a_state_without_a_history_is_loaded():
    seed(1)
    training = Training([SPARSITY])
    training.run(2)
    state = training.controller.get_compression_state()
    del state["history"]
    fresh = Training([SPARSITY], state=state)
    assert [row.epochs for row in fresh.controller.history] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["steps"].pop(), "'steps' has 1 entries, and 'epochs' 2"),
        (lambda h: h["measured"][LEVEL].append(0.5), f"'{LEVEL}' has 3 entries"),
        (lambda h: h["epochs"].reverse(), "'epochs' does not go up"),
        (lambda h: h["epochs"].__setitem__(0, -1), "history.epochs.0"),
        (lambda h: h["measured"][LEVEL].__setitem__(0, "much"), f"history.measured.{LEVEL}.0"),
        (lambda h: h.__setitem__("other", 1), "history.other"),
    ],
)
def test_a_damaged_history_is_refused(change, message):
    seed(1)
    training = Training([SPARSITY])
    training.run(2)
    state = training.controller.get_compression_state()
    change(state["history"])
    with pytest.raises(StateError, match=message):
        Training([SPARSITY], state=state)
    before = training.controller.get_compression_state()
    with pytest.raises(StateError, match=message):
        training.controller.load_state(state, training.model.state_dict())
    assert training.controller.get_compression_state() == before


class Failing:
    """A plugin that fails in an epoch."""

    @hookimpl
    def compress_epoch_step(self, clock):
        if clock.epoch == 1:
            raise RuntimeError("no epoch 1")


def test_an_epoch_that_fails_leaves_the_history_as_it_was():
    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    controller, _ = create_compressed_model(Net(), config, observers=[Failing()])
    controller.scheduler.epoch_step()
    controller.set_sparsity_level(0.5)
    state = controller.get_compression_state()
    assert state["history"]["epochs"] == [0]
    with pytest.raises(Exception, match="no epoch 1"):
        controller.scheduler.epoch_step()
    assert controller.get_compression_state() == state


def test_going_back_to_an_epoch_writes_the_history_anew_from_there():
    controller, _ = create_compressed_model(Net(), {"compression": {"algorithm": "magnitude_sparsity"}})
    for _ in range(4):
        controller.scheduler.epoch_step()
        controller.log_epoch(loss=1.0)
    controller.scheduler.epoch_step(1)
    assert [row.epochs for row in controller.history] == [0, 1, 2]


def test_copies_have_their_own_history():
    controller, _ = create_compressed_model(Net(), {"compression": {"algorithm": "magnitude_sparsity"}})
    controller.scheduler.epoch_step()
    for twin in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))):
        twin.log_epoch(loss=2.0)
        twin.scheduler.epoch_step()
        assert [row.epochs for row in twin.history] == [0, 1, 2]
        assert [row.epochs for row in controller.history] == [0, 1]
        assert controller.history[-1].given == {}


@pytest.mark.parametrize("algorithms", SETS.values(), ids=SETS)
def test_measuring_changes_nothing(algorithms):
    seed(1)
    training = Training(algorithms)
    training.run(1)
    before, rng = fingerprint(training.model), torch.get_rng_state()
    training.controller.log_epoch(loss=1.0)
    assert len(training.controller.history) == 2
    assert fingerprint(training.model) == before
    assert torch.equal(torch.get_rng_state(), rng)
