"""A controller that exists goes back, or forward, to a checkpoint of its model."""

import copy

import pytest
import torch

from compress_core import StateError, UsageError, load_checkpoint, read_checkpoint, save_checkpoint
from tests.session.checkpoint_helpers import PRUNING, QUANTIZATION, SETS, SPARSITY, Training, adam, assert_same, seed

STAGED = {
    **QUANTIZATION,
    "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2},
}
LIVE_SETS = {**SETS, "staged": [SPARSITY, STAGED]}


@pytest.mark.parametrize("algorithms", LIVE_SETS.values(), ids=LIVE_SETS)
@pytest.mark.parametrize("make_optimizer", [adam])
def test_goes_back_to_an_earlier_epoch_and_trains_to_the_same_bits(algorithms, make_optimizer, tmp_path):
    seed(1)
    training = Training(algorithms, make_optimizer)
    training.run(1)
    save_checkpoint(tmp_path / "early.pt", training.controller, **training.parts)
    early = copy.deepcopy(training.everything())
    training.run(3)
    late = copy.deepcopy(training.everything())
    load_checkpoint(tmp_path / "early.pt", training.controller, **training.parts)
    assert_same(training.everything(), early)
    training.run(3)
    assert_same(training.everything(), late)


@pytest.mark.parametrize("algorithms", LIVE_SETS.values(), ids=LIVE_SETS)
def test_goes_forward_to_a_later_epoch_of_another_controller(algorithms, tmp_path):
    seed(1)
    training = Training(algorithms)
    training.run(3)
    save_checkpoint(tmp_path / "late.pt", training.controller, **training.parts)
    training.run(1)
    fresh = Training(algorithms)  # created from config and data, not from the state
    load_checkpoint(tmp_path / "late.pt", fresh.controller, **fresh.parts)
    fresh.run(1)
    assert_same(fresh.everything(), training.everything())


def test_shrunk_since_then_is_refused_with_everything_as_it_was(tmp_path):
    seed(1)
    training = Training([PRUNING, SPARSITY])
    training.run(1)
    save_checkpoint(tmp_path / "whole.pt", training.controller)
    training.controller.shrink()
    before = copy.deepcopy([training.model.state_dict(), training.controller.get_compression_state()])
    with pytest.raises(StateError, match="Create model and controller anew"):
        load_checkpoint(tmp_path / "whole.pt", training.controller)
    assert_same([training.model.state_dict(), training.controller.get_compression_state()], before)


def test_a_shrunk_model_is_loaded_into_one_that_is_not(tmp_path):
    seed(1)
    training = Training([PRUNING, SPARSITY])
    training.run(1)
    training.controller.shrink()
    save_checkpoint(tmp_path / "small.pt", training.controller)
    fresh = Training([PRUNING, SPARSITY])
    before = copy.deepcopy([fresh.model.state_dict(), fresh.controller.get_compression_state()])
    # The optimizer of the fresh model would go on with the parameters it had.
    with pytest.raises(StateError, match="Create model and controller anew"):
        load_checkpoint(tmp_path / "small.pt", fresh.controller)
    assert_same([fresh.model.state_dict(), fresh.controller.get_compression_state()], before)


def test_load_state_takes_the_weights_with_it():
    seed(1)
    training = Training(SETS["all"])
    training.run(1)
    state, weights = training.controller.get_compression_state(), training.model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    outputs = training.model.eval()(torch.ones(2, 3, 8, 8))
    training.run(2)
    assert training.controller.pruning_level != state["algorithms"]["filter_pruning"]["state"]["level"]
    training.controller.load_state(state, weights)
    assert_same([training.controller.get_compression_state(), training.model.state_dict()], [state, weights])
    assert torch.equal(training.model.eval()(torch.ones(2, 3, 8, 8)), outputs)


@pytest.mark.parametrize("change", ["missing", "shape", "unexpected"])
def test_load_state_refuses_weights_of_another_model(change):
    seed(1)
    training = Training(SETS["all"])
    state, weights = training.controller.get_compression_state(), copy.deepcopy(training.model.state_dict())
    training.run(2)
    before = copy.deepcopy([training.model.state_dict(), training.controller.get_compression_state()])
    if change == "missing":
        weights.popitem()
    elif change == "shape":
        weights["fc.bias"] = torch.zeros(5)
    else:
        weights["fc.other"] = torch.zeros(5)
    with pytest.raises(StateError):
        training.controller.load_state(state, weights)
    assert_same([training.model.state_dict(), training.controller.get_compression_state()], before)


def test_load_state_refuses_other_algorithms():
    seed(1)
    training, other = Training([SPARSITY]), Training([QUANTIZATION])
    state = other.controller.get_compression_state()
    with pytest.raises(StateError, match=r"is of the algorithms \['quantization'\]"):
        training.controller.load_state(state, training.model.state_dict())
    with pytest.raises(StateError, match="has a compression state that this version does not read"):
        training.controller.load_state({"level": 0.5}, training.model.state_dict())


def test_a_stripped_controller_loads_nothing():
    seed(1)
    training = Training([SPARSITY])
    state, weights = training.controller.get_compression_state(), training.model.state_dict()
    training.controller.strip(do_copy=False)
    with pytest.raises(UsageError, match="stripped"):
        training.controller.load_state(state, weights)


def test_a_checkpoint_is_read_once_for_several_returns(tmp_path):
    seed(1)
    training = Training([SPARSITY])
    training.run(1)
    save_checkpoint(tmp_path / "a.pt", training.controller, **training.parts)
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    levels = []
    for _ in range(2):
        training.run(2)
        checkpoint.restore(training.controller, **training.parts)
        levels.append(training.controller.sparsity_level)
    assert (
        levels[0]
        == levels[1]
        == pytest.approx(checkpoint.compression_state["algorithms"]["magnitude_sparsity"]["state"]["level"], abs=0.02)
    )
