"""Checkpoints: a resumed training goes on with the same bits; what needs pickle is refused when it is saved."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    StateError,
    UsageError,
    create_compressed_model,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tests.session.checkpoint_helpers import (
    EXAMPLE,
    QUANTIZATION,
    SETS,
    SPARSITY,
    Net,
    Training,
    adam,
    assert_same,
    resumed,
    rewritten,
    seed,
    sgd,
)

# It goes on with the same bits.


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize(
    ("algorithms", "shrinks"), [*((name, False) for name in SETS), ("filter_pruning", True), ("all", True)]
)
def test_training_goes_on_with_the_same_bits(tmp_path, algorithms, shrinks, make_optimizer):
    path, ends = tmp_path / "checkpoint.pt", []
    for saves in (False, True):
        seed(1)
        training = Training(SETS[algorithms], make_optimizer)
        training.run(2)
        if shrinks:
            training.controller.shrink(training.optimizer, training.ema)
            assert training.model.conv1.weight.shape[0] < 8
        if saves:
            save_checkpoint(path, training.controller, **training.parts)
        training.run(2)
        ends.append((training.losses, training.everything()))
    assert_same(ends[0], ends[1])  # saving changes nothing

    again = resumed(path, SETS[algorithms], make_optimizer)
    again.run(2)
    assert again.losses == training.losses[len(again.losses) :]
    assert_same(again.everything(), ends[0][1])


def test_everything_is_as_when_it_was_saved(tmp_path):
    seed(1)
    training = Training(SETS["all"], adam)
    training.run(1)
    saved = copy.deepcopy(training.everything())
    save_checkpoint(tmp_path / "a.pt", training.controller, **training.parts)
    assert_same(training.everything(), saved)
    again = resumed(tmp_path / "a.pt", SETS["all"], adam)
    assert_same(again.everything(), saved)
    # One object can be restored several times: training does not write to it.
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    for _ in range(2):
        other = Training(SETS["all"], adam, checkpoint.compression_state)
        checkpoint.restore(other.controller, **other.parts)
        assert_same(other.everything(), saved)
        other.run(1)


def test_a_run_goes_back_in_place_where_algorithms_have_no_other_state(tmp_path):
    seed(1)
    training = Training([QUANTIZATION])
    training.run(1)
    save_checkpoint(tmp_path / "best.pt", training.controller, **training.parts)
    saved = copy.deepcopy(training.everything())
    training.run(1)
    end = copy.deepcopy(training.everything())
    load_checkpoint(tmp_path / "best.pt", training.controller, **training.parts)
    assert_same(training.everything(), saved)
    training.run(1)
    assert_same(training.everything(), end)


def test_file_is_loaded_without_pickle_and_extra_comes_back(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    extra = {"epoch": 3, "best": 0.5, "names": ["a", ("b", None)], "order": torch.arange(3), "key": {1: b"x", "s": {2}}}
    save_checkpoint(str(tmp_path / "a.pt"), controller, **extra)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["format"] == 1
    assert_same(content["model"], model.state_dict())
    assert content["model"]._metadata == model.state_dict()._metadata
    assert_same(load_checkpoint(tmp_path / "a.pt", controller), extra)
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert checkpoint.model_state._metadata == model.state_dict()._metadata
    assert checkpoint.compression_state == controller.get_compression_state()
    assert repr(checkpoint).endswith("a.pt': model, epoch, best, names, order, key)")


def test_several_optimizers_and_schedulers(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})

    def parts(model):
        parameters = list(model.parameters())
        optimizers = [sgd(parameters[:2]), adam(parameters[2:])]
        step, plateau = torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.ReduceLROnPlateau
        return {"optimizer": optimizers, "scheduler": (step(optimizers[0], 2), plateau(optimizers[1]))}

    mine = parts(model)
    for optimizer in mine["optimizer"]:
        model(EXAMPLE[0][0]).sum().backward()
        optimizer.step()
    mine["scheduler"][1].step(0.5)
    save_checkpoint(tmp_path / "a.pt", controller, **mine)
    state = read_checkpoint(tmp_path / "a.pt").compression_state
    again, other = create_compressed_model(Net(), {"compression": SPARSITY}, state)
    theirs = parts(other)
    load_checkpoint(tmp_path / "a.pt", again, **theirs)
    for name, objects in mine.items():
        for one, two in zip(objects, theirs[name], strict=True):
            assert_same(two.state_dict(), one.state_dict())
    with pytest.raises(StateError, match="has 2 optimizers, and 1 was given"):
        load_checkpoint(tmp_path / "a.pt", again, **{**theirs, "optimizer": theirs["optimizer"][0]})
    swapped = {**theirs, "optimizer": theirs["optimizer"][::-1]}
    with pytest.raises(StateError, match=r"optimizer\[0\]: the checkpoint .* has the state of a SGD, and a Adam was"):
        load_checkpoint(tmp_path / "a.pt", again, **swapped)


SCHEDULERS = {
    "multi_step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_of_torchs_schedulers_go_on(tmp_path, make):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    rates = []

    def steps(optimizer, scheduler, number):
        for _ in range(number):
            optimizer.step()
            scheduler.step()
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum")))

    optimizer = sgd(model.parameters())
    scheduler = make(optimizer)
    steps(optimizer, scheduler, 2)
    save_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer, scheduler=scheduler)
    steps(optimizer, scheduler, 5)
    other = sgd(model.parameters())
    again = make(other)
    load_checkpoint(tmp_path / "a.pt", controller, optimizer=other, scheduler=again)
    steps(other, again, 5)
    assert rates[2:7] == rates[7:]


def test_wrappers_of_the_model_leave_no_trace(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    names = list(model.state_dict())
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    wrapped(EXAMPLE[0][0]).sum().backward()
    optimizer = adam(wrapped.parameters())
    optimizer.step()
    save_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer)
    assert list(read_checkpoint(tmp_path / "a.pt").model_state) == names
    other = adam(model.parameters())
    load_checkpoint(tmp_path / "a.pt", controller, optimizer=other)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_distributed_wrappers_leave_no_trace(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    names = list(model.state_dict())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(wrapped.parameters())
        wrapped(EXAMPLE[0][0]).square().sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer)
        other = sgd(wrapped.parameters())
        load_checkpoint(tmp_path / "a.pt", controller, optimizer=other)
    finally:
        torch.distributed.destroy_process_group()
    assert list(read_checkpoint(tmp_path / "a.pt").model_state) == names
    assert_same(other.state_dict(), optimizer.state_dict())


def test_random_generators_can_be_left_alone(tmp_path):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller)
    expected = torch.rand(3), np.random.rand(3)
    torch.rand(2)
    state = torch.get_rng_state()
    load_checkpoint(tmp_path / "a.pt", controller, rng=False)
    assert torch.equal(torch.get_rng_state(), state)
    load_checkpoint(tmp_path / "a.pt", controller)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_the_config_may_have_another_target_when_a_training_goes_on(tmp_path):
    training = Training([SPARSITY])
    training.run(2)
    save_checkpoint(tmp_path / "a.pt", training.controller, **training.parts)
    further = {**SPARSITY, "params": {**SPARSITY["params"], "sparsity_target": 0.8}}
    again = resumed(tmp_path / "a.pt", [further])
    again.run(2)
    assert again.controller.sparsity_level == pytest.approx(0.8, abs=1e-2)


def test_a_rate_that_is_a_tensor(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    save_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer)
    rate = optimizer.param_groups[0]["lr"]
    rate.fill_(0.2)
    load_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1))


def test_a_disabled_scaler_says_that_it_does_not_scale(tmp_path, caplog):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller, scaler=torch.amp.GradScaler("cpu"))
    load_checkpoint(tmp_path / "a.pt", controller, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert "the one that was given is disabled" in caplog.text


def test_generators_of_devices_that_are_not_here(tmp_path, caplog):
    """A training that began on eight devices goes on where there are fewer."""
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller)
    expected = torch.rand(3)

    def change(content):
        content["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 8)

    load_checkpoint(rewritten(tmp_path / "a.pt", tmp_path, change), controller)
    assert "random numbers on CUDA will be others" in caplog.text
    assert torch.equal(torch.rand(3), expected)


def test_a_model_without_algorithms(tmp_path):
    ends = []
    for saves in (True, False):
        seed(2)
        training = Training([])
        training.run(1)
        if saves:
            save_checkpoint(tmp_path / "a.pt", training.controller, **training.parts)
        training.run(1)
        ends.append(training.everything())
    again = resumed(tmp_path / "a.pt", [])
    again.run(1)
    assert_same(again.everything(), ends[0])
    assert_same(ends[1], ends[0])


# What cannot be saved.


class Point:
    pass


LOOP = []
LOOP.append(LOOP)
UNSAFE = [
    ({"acc": np.float64(0.5)}, r"extra\['acc'\] is of type numpy.float64, .* float\(x\) of a NumPy scalar"),
    ({"a": {"b": [1, np.zeros(2)]}}, r"extra\['a'\]\['b'\]\[1\] is of type numpy.ndarray"),
    ({"f": print}, r"extra\['f'\] is of type builtins.builtin_function_or_method"),
    ({"p": Point()}, r"extra\['p'\] is of type .*Point"),
    ({"g": lambda: 0}, r"extra\['g'\] is of type builtins.function"),
    ({"k": {Point: 1}}, r"a key of extra\['k'\] is of type builtins.type"),
    ({"file": Path("a")}, r"extra\['file'\] is of type pathlib"),
    ({"loop": LOOP}, r"extra\['loop'\]\[0\] contains itself"),
    ({"optimizer": Point()}, r"optimizer: a Point has no state_dict\(\) and load_state_dict\(\)"),
    ({"scheduler": [1]}, "scheduler: a int has no state_dict"),
]


@pytest.mark.parametrize(("arguments", "match"), UNSAFE, ids=[match[:25] for _, match in UNSAFE])
def test_what_needs_pickle_is_refused_before_anything_is_written(tmp_path, arguments, match):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    (tmp_path / "a.pt").write_text("old")
    with pytest.raises(UsageError, match=match):
        save_checkpoint(tmp_path / "a.pt", controller, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_text() == "old"


def test_states_that_need_pickle_are_named(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    optimizer = sgd(model.parameters())
    optimizer.param_groups[0]["lr"] = np.float32(0.1)
    with pytest.raises(UsageError, match=r"optimizer\['param_groups'\]\[0\]\['lr'\] is of type numpy.float32"):
        save_checkpoint(tmp_path / "a.pt", controller, optimizer=optimizer)

    class Rate:
        def __init__(self):
            self.table = np.ones(3)

        def __call__(self, step):
            return 1.0

    scheduler = torch.optim.lr_scheduler.LambdaLR(sgd(model.parameters()), Rate())
    with pytest.raises(UsageError, match=r"scheduler\['lr_lambdas'\]\[0\]\['table'\] is of type numpy.ndarray"):
        save_checkpoint(tmp_path / "a.pt", controller, scheduler=scheduler)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_saved_without_graph_and_hooks(tmp_path):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    weight = torch.ones(3, requires_grad=True)
    weight.register_hook(lambda gradient: gradient)
    save_checkpoint(tmp_path / "a.pt", controller, weight=weight, loss=weight.sum(), own=nn.Parameter(torch.ones(2)))
    extra = load_checkpoint(tmp_path / "a.pt", controller)
    assert extra["loss"] == 3 and not any(tensor.requires_grad for tensor in extra.values())


def test_only_a_live_controller_is_saved(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    with pytest.raises(UsageError, match=r"controller: got a Net.*returns \(controller, model\)"):
        save_checkpoint(tmp_path / "a.pt", model)
    with pytest.raises(UsageError, match="controller: got a NoneType, not a CompressionController"):
        save_checkpoint(tmp_path / "a.pt", None)
    controller.strip(do_copy=False)
    with pytest.raises(UsageError, match="stripped in place"):
        save_checkpoint(tmp_path / "a.pt", controller)
    assert list(tmp_path.iterdir()) == []
