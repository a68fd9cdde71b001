"""Footprints: counts of a model, and what is said of their changes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress_core.contract.footprint import Footprint
from compress_core.errors import PluginError
from compress_core.trace import trace

BATCH_INDEPENDENT = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 16, 1)),
        (3, 17, 19),
    ),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU()), (6, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 7, 7)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (4, 20)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 3), (2, 6, 6, 6)),
    "linear layers": (lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False)), (5,)),
    "linear over time": (lambda: nn.Linear(5, 7), (11, 5)),
}


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_operations_are_those_that_torch_counts_for_one_sample(name, samples):
    make, shape = BATCH_INDEPENDENT[name]
    model = make()
    found = Footprint.of_model(model, trace(model, torch.rand(samples, *shape)))
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, *shape))
    assert found.operations == counter.get_total_flops()


def test_attention_counts_its_products():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 7, 8), torch.rand(1, 2, 7, 8)
    found = Footprint.of_model(Attention(), trace(Attention(), (q, k, v)))
    # Of 2 heads: 5 x 7 scores of 8 products each, and 5 x 8 results of 7 products each.
    assert found.operations == 2 * 2 * (5 * 7 * 8 + 5 * 8 * 7)


def test_a_layer_that_runs_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    found = Footprint.of_model(Twice(), trace(Twice(), torch.rand(1, 4)))
    assert (found.parameters, found.operations) == (20, 2 * 2 * 16)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_an_lstm_counts_its_products(options, samples):
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    model = Last(8, 16, **options).eval()
    shape = (samples, 5, 8) if model.batch_first else (5, samples, 8)
    # With transposed inputs, the size of the batch is not the first one of the input.
    per_sample = 1 if model.batch_first else samples / shape[0]
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "weight" in name)
    found = Footprint.of_model(model, trace(model, torch.rand(shape)))
    assert found.operations == 2 * 5 * weights * per_sample


def test_without_a_trace_operations_are_open():
    found = Footprint.of_model(nn.Linear(2, 3))
    assert found.figures() == {"parameters": 9, "nonzero": 9, "operations": None, "size": 36}
    assert "example input" in found.open["operations"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bytes_are_those_of_the_dtype(dtype):
    model = nn.Linear(10, 3).to(dtype)
    assert Footprint.of_model(model).size == 33 * dtype.itemsize


def test_zeros_are_counted():
    model = nn.Linear(10, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0).view(-1)[:7] = 0
    assert Footprint.of_model(model).nonzero == 33


def test_a_shared_parameter_counts_once_under_each_of_its_names():
    model = nn.Module()
    model.first = nn.Linear(4, 4, bias=False)
    model.second = nn.Linear(4, 4, bias=False)
    model.second.weight = model.first.weight
    found = Footprint.of_model(model)
    assert found.parameters == 16
    assert found.with_levels({"second.weight": 0.5}).nonzero == 8
    assert found.with_levels({"first.weight": 0.5, "second.weight": 0.5}).nonzero == 8
    eight = found.with_bits({"first.weight": 8, "second.weight": 8}, extra_bytes={"second.weight": 5})
    assert eight.size == 16 + 5


def test_effects_compose():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    found = Footprint.of_model(model, trace(model, torch.rand(1, 3, 8, 8)))
    smaller = found.with_shapes({"0.weight": (4, 3, 3, 3), "1.weight": (8, 4, 3, 3)}, 1000)
    assert (smaller.parameters, smaller.operations) == (4 * 27 + 8 * 36, 1000)
    sparse = smaller.with_levels({"1.weight": 0.75})
    assert sparse.nonzero == 4 * 27 + 8 * 36 // 4
    assert sparse.size == smaller.size == 4 * smaller.parameters
    stored = sparse.with_bits({"1.weight": 4}, stored_bits=8, extra_bytes={"1.weight": 40})
    assert stored.size == 4 * 4 * 27 + 8 * 36 + 40
    packed = sparse.with_bits({"1.weight": 4})
    assert packed.size == 4 * 4 * 27 + 8 * 36 // 2


def test_zeros_that_are_there_count_towards_a_level():
    model = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0).view(-1)[:60] = 0
    found = Footprint.of_model(model)
    assert found.with_levels({"weight": 0.5}).nonzero == 40
    assert found.with_levels({"weight": 0.7}).nonzero == 30


def test_a_figure_that_is_open_keeps_its_first_reason():
    found = Footprint.of_model(nn.Linear(2, 2)).left_open("one", ("size",)).left_open("two", ("size", "nonzero"))
    assert found.open["size"] == "one"
    assert found.open["nonzero"] == "two"
    assert found.figures()["size"] is None
    assert found.to_dict()["parameters"] == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda footprint: footprint.with_shapes({"other": (1,)}),
        lambda footprint: footprint.with_levels({"other": 0.5}),
        lambda footprint: footprint.with_bits({"other": 8}),
    ],
)
def test_a_parameter_that_is_not_there_is_refused_by_name(change):
    with pytest.raises(PluginError, match="'other'"):
        change(Footprint.of_model(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 4, device="meta"), nn.Identity, lambda: nn.Linear(0, 3, bias=False)]
)
def test_models_whose_values_cannot_be_counted(make):
    found = Footprint.of_model(make())
    assert found.nonzero == found.parameters
