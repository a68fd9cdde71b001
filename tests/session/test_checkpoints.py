"""Checkpoints: a resumed training goes on with the same bits; a broken or foreign file changes nothing."""

import copy
import functools
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    FileError,
    StateError,
    UsageError,
    create_compressed_model,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tests.conftest import ROOT
from tests.session.checkpoint_helpers import (
    EXAMPLE,
    QUANTIZATION,
    SETS,
    SPARSITY,
    Net,
    Training,
    adam,
    assert_same,
    seed,
    sgd,
)


def resumed(path, algorithms, make_optimizer=sgd):
    """A training as a new process would resume it: other weights, other random numbers."""
    seed(99)
    checkpoint = read_checkpoint(path)
    training = Training(algorithms, make_optimizer, checkpoint.compression_state)
    checkpoint.restore(training.controller, **training.parts)
    return training


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


# What does not fit changes nothing.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of a checkpoint after one epoch of all algorithms."""
    path = tmp_path_factory.mktemp("checkpoint") / "saved.pt"
    seed(1)
    training = Training(SETS["all"])
    training.run(1)
    save_checkpoint(path, training.controller, **training.parts, epoch=1)
    return path


def ready(path, make_optimizer=sgd, steps=1):
    """A training that was resumed from the state, and then trained by steps of its optimizer without the controller."""
    seed(5)
    training = Training(SETS["all"], make_optimizer, read_checkpoint(path).compression_state)
    for _ in range(steps):
        training.scaler.scale(training.model.train()(EXAMPLE[0][0]).square().mean()).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.scheduler.step()
        training.ema.update_parameters(training.model)
    return training


def refused(path, training, match, error=StateError, **changes):
    """Asserts that a checkpoint is refused, and that nothing has changed; returns the message."""
    before, gradients = copy.deepcopy(training.everything()), [p.grad for p in training.model.parameters()]
    containers = [training.optimizer.param_groups[0], training.optimizer.state]
    parts = {**training.parts, **changes}
    with pytest.raises(error, match=match) as caught:
        load_checkpoint(path, training.controller, **parts)
    assert_same(training.everything(), before)
    assert all(p.grad is g for p, g in zip(training.model.parameters(), gradients, strict=True))
    assert training.optimizer.param_groups[0] is containers[0] and training.optimizer.state is containers[1]
    return str(caught.value)


def rewritten(path, folder, change):
    """A checkpoint with another content."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, folder / "rewritten.pt")
    return folder / "rewritten.pt"


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "scaler", "ema"])
def test_what_is_saved_has_to_be_given_and_the_other_way_round(saved, tmp_path, name):
    training = ready(saved)
    message = refused(saved, training, rf"has 1 {name}, and none was given; pass {name}=", **{name: None})
    assert "read_checkpoint(path).model_state" in message
    training.controller.scheduler.clock = read_clock(saved)
    parts = {**training.parts, name: None}
    save_checkpoint(tmp_path / "a.pt", training.controller, **parts)
    refused(tmp_path / "a.pt", training, f"has no {name}, and 1 was given; leave {name}= out")


def read_clock(path):
    """The clock of a checkpoint."""
    from compress_core import Clock

    return Clock(**read_checkpoint(path).compression_state["scheduler"])


def test_another_optimizer_is_refused(saved):
    refused(saved, ready(saved, adam), "optimizer: .* the state of a SGD, and a Adam was given")
    training = ready(saved)
    parameters = list(training.model.parameters())
    fewer = sgd(parameters[1:])
    refused(saved, training, r"groups of \[\d+\] parameters, here they are of \[\d+\]", optimizer=fewer)
    # Momentum of one weight would be that of another, of the same shape.
    names = [name for name, _ in training.model.named_parameters()]
    one, two = names.index("bn1.weight"), names.index("bn1.bias")
    parameters[one], parameters[two] = parameters[two], parameters[one]
    message = refused(saved, training, "optimizer", optimizer=sgd(parameters))
    assert "'bn1.weight' of shape [8] where the parameter 'bn1.bias' of shape [8] is here" in message
    other = sgd([*parameters[:-1], nn.Parameter(torch.zeros_like(parameters[-1]))])
    refused(saved, training, "optimizer", optimizer=other)


def test_a_controller_in_another_state_is_refused_with_the_remedy(saved):
    for training in (Training(SETS["all"]), ready(saved)):
        training.run(2)
        message = refused(saved, training, "with another state of 'filter_pruning' than the controller has")
        assert "compression_state=checkpoint.compression_state" in message
    refused(saved, Training(SETS["filter_pruning"]), r"is of the algorithms .* use the config")


def test_a_shrunk_checkpoint_needs_a_controller_from_its_state(tmp_path):
    training = Training(SETS["filter_pruning"])
    training.controller.shrink(training.optimizer, training.ema)
    save_checkpoint(tmp_path / "small.pt", training.controller, **training.parts)
    message = refused(tmp_path / "small.pt", Training(SETS["filter_pruning"]), "does not fit|another (plan|state)")
    assert "compression_state=checkpoint.compression_state" in message
    assert resumed(tmp_path / "small.pt", SETS["filter_pruning"]).model.conv1.weight.shape[0] == 6


def set_in(path, *keys):
    """A change of one value of the content: the last key is the value."""

    def change(content):
        *before, last, value = keys
        functools.reduce(lambda found, key: found[key], before, content)[last] = value

    return pytest.param(change, path, id=path)


CHANGES = [
    set_in("'conv1.weight' is of .3, 3. ", "model", "conv1.weight", torch.zeros(3, 3)),
    set_in("'fc.bias' is of .4,. and torch.float64", "model", "fc.bias", torch.zeros(4, dtype=torch.float64)),
    set_in("'fc.bias' is of str", "model", "fc.bias", "hello"),
    set_in("it lacks nothing and has .'more'. besides", "model", "more", torch.zeros(1)),
    set_in("size mismatch for bn1.running_mean", "model", "bn1.running_mean", torch.zeros(3)),
    set_in("it lacks .'n_averaged'", "parts", "ema", 0, "state", {}),
    set_in("optimizer: the state in the checkpoint .* does not fit", "parts", "optimizer", 0, "state", {}),
    set_in("scaler: the state in the checkpoint .* does not fit", "parts", "scaler", 0, "state", {}),
    set_in(
        "random generators: the state in the checkpoint .* does not fit",
        "rng",
        "torch",
        torch.zeros(3, dtype=torch.uint8),
    ),
    set_in("random generators: the state in the checkpoint .* does not fit", "rng", "numpy", {}),
    set_in("random generators: the state in the checkpoint .* does not fit", "rng", {}),
    set_in(
        "clock: the state in the checkpoint .* does not fit: not a scheduler state",
        "compression_state",
        "scheduler",
        None,
    ),
    set_in("another plan of 'quantization'", "compression_state", "algorithms", "quantization", "plan", {}),
    set_in("another plan of 'quantization'", "compression_state", "algorithms", "quantization", 5),
    set_in("a compression state that this version does not read", "compression_state", {}),
    set_in("has the format 2, this version reads 1; load it with", "format", 2),
    set_in("it holds something else", "kind", "other"),
    set_in("model: Input should be an instance of dict", "model", [1]),
    set_in("parts.optimizer.0.kind: Input should be a valid string", "parts", "optimizer", 0, "kind", 1),
    set_in("parts.optimizer: List should have at least 1", "parts", "optimizer", []),
    set_in("Extra inputs are not permitted", "more", 1),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_content_that_does_not_fit_changes_nothing(saved, tmp_path, change, match):
    message = refused(rewritten(saved, tmp_path, change), ready(saved), match)
    assert "rewritten.pt" in message


class Failing:
    """Saves nothing; loading it fails, after it has counted."""

    def __init__(self, error):
        self.error = error
        self.loaded = []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.loaded.append(state)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_in_the_last_part_takes_everything_back(tmp_path, error):
    seed(1)
    training = Training(SETS["all"])
    training.run(1)
    average = Failing(None)
    save_checkpoint(tmp_path / "a.pt", training.controller, **{**training.parts, "ema": average})
    other = ready(tmp_path / "a.pt", steps=2)
    average.error = error
    kind, match = StateError, "ema: the state in the checkpoint .* does not fit: no"
    if not isinstance(error, ValueError):
        kind, match = KeyboardInterrupt, None
    refused(tmp_path / "a.pt", other, match, kind, ema=average)
    assert average.loaded == []
    fresh = Training(SETS["all"], sgd, read_checkpoint(tmp_path / "a.pt").compression_state)
    refused(tmp_path / "a.pt", fresh, match, kind, ema=average)  # an optimizer without a state
    assert fresh.optimizer.state == {}


# Broken and hostile files.


def test_a_truncated_file_is_refused(saved, tmp_path):
    training, data = ready(saved), saved.read_bytes()
    broken = tmp_path / "broken.pt"
    for length in (0, 1, 100, len(data) // 3, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:length])
        message = refused(broken, training, r"broken.pt' is damaged, or was not written by save_checkpoint")
        assert "Use another checkpoint; do not load it with weights_only=False" in message


def test_any_flipped_bit_of_the_numbers_is_found(saved, tmp_path):
    """torch itself reads wrong numbers from such a file."""
    data, broken = saved.read_bytes(), tmp_path / "broken.pt"
    archive = zipfile.ZipFile(saved)
    records = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 100]
    assert records
    for entry in records[:5]:
        changed = bytearray(data)
        content = archive.read(entry)
        changed[data.index(content) + len(content) // 2] ^= 1
        broken.write_bytes(changed)
        torch.load(broken, weights_only=True)
        with pytest.raises(StateError, match=f"the record '{entry.filename}' does not have its checksum"):
            read_checkpoint(broken)


def test_sums_are_written_even_if_the_user_has_switched_them_off(saved, tmp_path):
    from torch.serialization import get_crc32_options, set_crc32_options

    training = ready(saved)
    set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "a.pt", training.controller)
        assert get_crc32_options() is False
    finally:
        set_crc32_options(True)
    read_checkpoint(tmp_path / "a.pt")


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile_files(folder, trap):
    """Files that run code if they are loaded as pickles, and files that are something else."""
    content = {"kind": "compress_core.checkpoint", "format": 1, "extra": Runs(trap)}
    torch.save(content, folder / "code.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(content))
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "state_dict.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("hello")
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * (1 << 20))
    return sorted(path for path in folder.iterdir() if path.suffix == ".pt")


def test_foreign_and_hostile_files_run_nothing_and_change_nothing(saved, tmp_path):
    trap = tmp_path / "trap"
    training, files = ready(saved), hostile_files(tmp_path, trap)
    assert len(files) == 9
    for path in files:
        message = refused(path, training, "is damaged, or was not written by save_checkpoint")
        assert str(path) in message
        assert not trap.exists()
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert trap.exists()  # the trap works


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot read '.*none.pt': No such file") as caught:
        read_checkpoint(tmp_path / "none.pt")
    assert isinstance(caught.value, OSError) and caught.value.errno == 2
    with pytest.raises(FileError, match="Is a directory"):
        read_checkpoint(tmp_path)


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


# Killed while it writes.

WRITER = """
import sys, torch
from torch import nn
from compress_core import create_compressed_model, save_checkpoint
import tests.conftest as conftest
from compress_core.registry import Registry, use_registry
registry = Registry()
registry.load_entry_points(conftest.declared_entry_points())
with use_registry(registry):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    controller, model = create_compressed_model(model, {"compression": {"algorithm": "magnitude_sparsity"}})
    number = 0
    while True:
        number += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        save_checkpoint(sys.argv[1], controller, number=number)
        print(number, flush=True)
"""


def kill_while_it_writes(path, in_the_middle):
    """Starts a process that saves in a loop, kills it, and returns the number of its last complete save."""
    script = path.parent.parent / "writer.py"
    script.write_text(WRITER)
    places = [ROOT, *(ROOT / "plugins").iterdir()]
    environment = {"PYTHONPATH": ":".join(str(place) for place in places), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    with subprocess.Popen(
        [sys.executable, script, path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        done = int(process.stdout.readline())
        while in_the_middle and not any(size_of(entry) > 1 << 20 for entry in path.parent.glob(".*.part")):
            pass
        process.send_signal(signal.SIGKILL)
        done = max([done, *(int(line) for line in process.stdout.read().splitlines())])
    assert process.returncode == -signal.SIGKILL
    return done


def size_of(path):
    """The size of a file that another process may rename at any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def assert_survives(tmp_path, kills):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path, remains = folder / "checkpoint.pt", 0
    for number in range(kills):
        done = kill_while_it_writes(path, in_the_middle=number % 4 > 0)
        checkpoint = read_checkpoint(path)
        # The last complete one; or the next, if it was killed between the renaming and the message.
        assert checkpoint.extra["number"] in (done, done + 1)
        weights = [checkpoint.model_state[f"{place}.weight"].unique().tolist() for place in (0, 1)]
        assert weights == [[checkpoint.extra["number"]]] * 2
        left = [entry for entry in folder.iterdir() if entry != path]
        assert len(left) <= 1, left
        remains += len(left)
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(path, controller)
    assert list(folder.iterdir()) == [path]  # what the killed ones left is gone
    assert remains > 0  # some of them were killed while a file was half written


def test_a_kill_leaves_the_last_checkpoint(tmp_path):
    assert_survives(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills_leave_the_last_checkpoint(tmp_path):
    assert_survives(tmp_path, 20)


def test_an_error_of_torch_in_writing_leaves_the_old_file(tmp_path, monkeypatch):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller, number=1)

    def interrupted(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a.pt", controller, number=2)
    assert read_checkpoint(tmp_path / "a.pt").extra == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller, number=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write '.*a.pt': File too large"):
            save_checkpoint(tmp_path / "a.pt", controller, much=torch.zeros(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(tmp_path / "a.pt").extra == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
