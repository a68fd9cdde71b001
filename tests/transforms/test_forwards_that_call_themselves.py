"""Forwards that call `self.forward`: transforms apply once, where a trace has counted the calls."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from compress_core import TransformError
from compress_core.transforms import CallInput, CallOutput, ModuleInput, ModuleOutput
from tests.activation_helpers import add, calls


class Twice(nn.Module):
    """Halves a batch until a single sample is left, or calls itself once."""

    def forward(self, x, inner=False):
        if not inner:
            return self.forward(x, inner=True)
        return torch.relu(x)


class Augmented(nn.Module):
    """Averages over views of its input, by forwards within the forward of another method."""

    def forward(self, x, augment=True):
        return self.averaged(x) if augment else torch.relu(x)

    def averaged(self, x):
        return sum(self.forward(view, augment=False) for view in (x, x)) / 2


class TakesBatches(nn.Module):
    """Takes an image, or in training the whole batch with the image (detectors of ultralytics)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Identity()

    def forward(self, x):
        return self.loss(x) if isinstance(x, dict) else torch.relu(self.scale(x))

    def loss(self, batch):
        return self.forward(batch["img"]) - batch["target"]


class UnpacksBatches(TakesBatches):
    """Computes with the image of a batch itself."""

    def loss(self, batch):
        return torch.relu(self.scale(batch["img"])) - batch["target"]


PLACES = {
    "input": ModuleInput("", (0,)),
    "output": ModuleOutput("", ()),
    "call input": CallInput("", "torch.relu", calls(), (0,)),
    "call output": CallOutput("", "torch.relu", calls(), ()),
}


@pytest.fixture
def x():
    return torch.randint(1, 9, (4, 3)).float()


@pytest.mark.parametrize("place", PLACES)
def test_transforms_apply_once(place, x):
    model = Twice()
    add(model, PLACES[place])  # times ten
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):
            assert torch.equal(twin(x), 10 * x)
        assert torch.equal(twin.eval()(x), 10 * x)
        assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(x), 10 * x)


@pytest.mark.parametrize(("place", "factor"), [("input", 10), ("output", 10)])
def test_transforms_of_repeated_forwards_apply_once(place, factor, x):
    model = Augmented()
    add(model, PLACES[place])
    assert torch.equal(model(x), factor * x)
    assert torch.equal(model(x, augment=False), factor * x)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_input_in_a_batch_is_the_input(by_keyword, compiled, x):
    model = TakesBatches()
    add(model, PLACES["input"])
    add(model, PLACES["call output"])
    model = torch.compile(model, backend="eager") if compiled else model
    batch = {"img": x, "target": torch.ones_like(x), "name": "a"}
    for _ in range(2):
        assert torch.equal(model(x), 100 * x)
        assert torch.equal(model(x=batch) if by_keyword else model(batch), 100 * x - 1)
    assert batch["img"] is x


def test_a_batch_that_is_unpacked_otherwise_is_named(x):
    model = UnpacksBatches()
    add(model, PLACES["input"])
    for _ in range(2):
        with pytest.raises(TransformError, match="model: input 0: the value is a dict where"):
            model({"img": x, "target": x})
        assert torch.equal(model(x), 10 * x)


def test_an_error_in_a_forward_leaves_nothing_behind(x):
    model = Twice()
    add(model, PLACES["input"])
    with pytest.raises(TypeError):
        model("no tensor")
    assert torch.equal(model(x), 10 * x)


def test_threads_do_not_see_each_other(x):
    model, entered, leave = Twice(), threading.Event(), threading.Event()

    def wait(module, args):
        entered.set()
        assert leave.wait(10)

    add(model, PLACES["output"])
    relu = torch.relu
    results = []

    class Waiting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is relu:
                wait(None, None)
            return func(*args, **(kwargs or {}))

    def run():
        with Waiting():
            results.append(model(x))

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(10)
    assert torch.equal(model(x), 10 * x)  # while the other thread is inside the forward
    leave.set()
    thread.join()
    assert torch.equal(results[0], 10 * x)
