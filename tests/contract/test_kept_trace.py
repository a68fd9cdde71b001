"""A trace is kept for the next algorithm, and only as long as the model would be traced alike."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import Stage, create_compressed_model
from compress_core.config import CompressionConfig
from compress_core.contract import context as contexts
from compress_core.contract.context import Context
from compress_core.contract.kept_trace import KeptTrace
from compress_core.trace import trace
from compress_core.transforms import add_activation_transform, add_weight_transform
from compress_core.transforms.places import ModuleOutput

SCALE = [2.0]


class Encoder(nn.Module):
    """Has positions, which are no weight, and attributes that its forward depends on."""

    steps = 1

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 8))
        self.inner, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.options, self.factor = {"twice": False}, 1

    def forward(self, x):
        x = (x + self.positions) * SCALE[0] * self.factor
        for _ in range(self.steps + self.options["twice"]):
            x = self.head(F.relu(self.norm(self.inner(x))))
        return x


class Products(nn.Module):
    """Has a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(F.relu(x @ self.weight))


class Other(nn.Linear):
    pass


def kept(model):
    keeper = KeptTrace()
    keeper.keep_trace(model, trace(model, torch.ones(2, 8), training=True))
    return keeper


def other_hook(module, args, output):
    return output * 2


CHANGES = {
    "attribute": lambda m: setattr(m, "factor", 3),
    "entry of a dict": lambda m: m.options.update(twice=True),
    "attribute of the class": lambda m: setattr(Encoder, "steps", 2),
    "global variable": lambda m: SCALE.__setitem__(0, 5.0),
    "module": lambda m: setattr(m, "head", nn.Linear(16, 8)),
    "module added": lambda m: m.add_module("more", nn.ReLU()),
    "module removed": lambda m: m._modules.pop("norm"),
    "name": lambda m: m._modules.update(other=m._modules.pop("norm")),
    "class": lambda m: setattr(m.head, "__class__", Other),
    "forward": lambda m: setattr(m.head, "forward", F.relu),
    "parameter": lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(8, 16))),
    "parameter removed": lambda m: setattr(m.head, "bias", None),
    "write": lambda m: m.head.weight.detach().add_(1),
    "data": lambda m: setattr(m.head.weight, "data", torch.ones(8, 16)),
    "dtype": lambda m: m.double(),
    "frozen": lambda m: m.head.requires_grad_(False),
    "buffer": lambda m: m.register_buffer("more", torch.ones(2)),
    "buffer removed": lambda m: m.norm._buffers.update(running_mean=None),
    "loose tensor": lambda m: setattr(m, "table", torch.ones(2)),
    "hook": lambda m: m.head.register_forward_hook(other_hook),
    "hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_depends_on(name, monkeypatch):
    monkeypatch.setattr(Encoder, "steps", 1)
    monkeypatch.setitem(globals(), "SCALE", [2.0])
    model = Encoder()
    keeper = kept(model)
    assert keeper.trace_of(model) is not None
    assert keeper.trace_of(copy.deepcopy(model)) is None
    CHANGES[name](model)
    assert keeper.trace_of(model) is None


def test_transforms_are_no_change():
    model = Encoder()
    before, keeper = trace(model, torch.ones(2, 8)), kept(model)
    add_weight_transform(model, "head.weight", nn.Identity(), stage=Stage.SPARSITY, key="same")
    add_activation_transform(model, ModuleOutput("inner", ()), nn.ReLU(), stage=Stage.PRECISION, key="relu")
    assert keeper.trace_of(model).forwards == before.forwards
    model.eval()
    assert keeper.trace_of(model) is not None


def test_a_list_that_is_changed_is_not_the_next_ones():
    model = Encoder()
    keeper = kept(model)
    found = keeper.trace_of(model)
    found.forwards.clear(), found.training.clear(), found.modules.clear()
    again = keeper.trace_of(model)
    assert (len(again.forwards), len(again.training), len(again.modules)) == (1, 1, 4)


def test_a_forward_that_has_read_values_is_traced_again():
    model = Encoder()
    model.head.forward = lambda x: x[:, :8] if x.sum().item() > 0 else x[:, 8:]
    assert kept(model).trace_of(model) is None


def test_copies_hold_nothing_and_neither_does_what_is_closed():
    model = Encoder()
    keeper = kept(model)
    for copied in (copy.deepcopy(keeper), pickle.loads(pickle.dumps(keeper))):
        assert copied.trace_of(model) is None
    keeper.close()
    keeper.keep_trace(model, trace(model, torch.ones(2, 8)))
    assert keeper.trace_of(model) is None
    assert Context(CompressionConfig.load({}), resuming=True).kept_trace._is_closed


ALL = ["filter_pruning", "magnitude_sparsity", "quantization"]


def document(names):
    sections = [{"algorithm": name, "initializer": {}} for name in names]
    for section in sections:
        if section["algorithm"] == "quantization":
            section["initializer"] = {"range": {"num_init_samples": 0}}
        if section["algorithm"] == "filter_pruning":
            section["params"] = {"multiple_of": 1}
    return {"input_info": {"sample_size": [2, 8]}, "compression": sections}


@pytest.fixture
def traces(monkeypatch):
    """The number of traces of each creation's model."""
    made = []
    monkeypatch.setattr(contexts, "trace", lambda *args, **kwargs: made.append(args) or trace(*args, **kwargs))
    return made


@pytest.mark.parametrize(
    ("make", "names", "number"),
    [
        *((Encoder, names, 1) for names in (ALL, ALL[:1], ALL[1:2], ALL[2:])),
        *((Products, names, 2) for names in (ALL, ALL[:1], ALL[2:], ALL[1:])),
        (Products, ALL[1:2], 1),
        (Encoder, ALL[1:], 2),
    ],
)
def test_how_often_a_model_is_traced(make, names, number, traces):
    controller, _ = create_compressed_model(make(), document(names))
    assert len(traces) == number
    assert controller._lifecycle.context.kept_trace._marks is None


@pytest.mark.parametrize("make", [Encoder, Products])
def test_plans_are_those_of_a_trace_for_each_algorithm(make, monkeypatch):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    controller, _ = create_compressed_model(model, document(ALL))
    monkeypatch.setattr(KeptTrace, "_begin", lambda *_: False)
    expected, _ = create_compressed_model(twin, document(ALL))
    assert controller.get_compression_state() == expected.get_compression_state()
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
