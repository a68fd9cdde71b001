"""What does not fit a checkpoint changes nothing."""

import functools

import pytest
import torch
from torch import nn

from compress_core import (
    StateError,
    create_compressed_model,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tests.session.checkpoint_helpers import (
    QUANTIZATION,
    SETS,
    SPARSITY,
    Net,
    Training,
    adam,
    ready,
    refused,
    resumed,
    rewritten,
    seed,
    sgd,
)


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


def test_a_controller_of_other_algorithms_is_refused(saved):
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
    set_in(r"optimizer: .* has groups of \[\] parameters", "parts", "optimizer", 0, "parameters", None),
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
        r"the checkpoint .* does not fit: compression_state.scheduler: Input should be a valid dictionary",
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


def test_the_clock_is_taken_back_too(tmp_path):
    training = Training([QUANTIZATION])
    training.run(1)
    average = Failing(None)
    save_checkpoint(tmp_path / "a.pt", training.controller, **{**training.parts, "ema": average})
    training.run(1)
    average.error = ValueError("no")
    refused(tmp_path / "a.pt", training, "ema: the state in the checkpoint", ema=average)
    assert training.controller.scheduler.current_epoch == 1


class Slots:
    """Keeps a tensor and a list in slots, and fails after changing them."""

    __slots__ = ("history", "shadow")

    def __init__(self):
        self.shadow, self.history = torch.ones(2), [1]

    def state_dict(self):
        return {"shadow": self.shadow}

    def load_state_dict(self, state):
        self.shadow.zero_()
        self.history.append(2)
        self.shadow = None
        raise ValueError("no")


def test_objects_of_any_kind_are_taken_back(tmp_path):
    controller, model = create_compressed_model(Net(), {"compression": SPARSITY})
    average = Slots()
    shadow = average.shadow

    class Rate:
        factor = 1.0

        def __call__(self, step):
            return self.factor

    scheduler = torch.optim.lr_scheduler.LambdaLR(sgd(model.parameters()), Rate())
    scheduler.lr_lambdas[0].factor = 0.5
    save_checkpoint(tmp_path / "a.pt", controller, scheduler=scheduler, ema=average)
    scheduler.lr_lambdas[0].factor = 0.25
    with pytest.raises(StateError, match=r"ema: .* does not fit: no"):
        load_checkpoint(tmp_path / "a.pt", controller, scheduler=scheduler, ema=average)
    assert average.shadow is shadow and torch.equal(shadow, torch.ones(2)) and average.history == [1]
    assert scheduler.lr_lambdas[0].factor == 0.25
