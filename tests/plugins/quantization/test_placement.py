"""Where quantizers stand: counts that are known for public networks, and rules on small ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError
from compress_core.config.scopes import ScopeFilter
from compress_core.trace import trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.plan import PlannedQuantizer
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile
from examples.common.networks import resnet18
from tests.placement_helpers import Block, counts, places, plan


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def alexnet():
    features = [
        nn.Conv2d(3, 8, 11, 4, 5),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 5, padding=2),
        nn.ReLU(True),
    ]
    features += [nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(True), nn.Conv2d(16, 8, 3, padding=1)]
    features += [nn.ReLU(True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten()]
    classifier = [nn.Dropout(), nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(True)]
    return nn.Sequential(*features, *classifier, nn.Linear(16, 10))


def vgg16():
    layers, channels = [], 3
    for width in (8, 8, "M", 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers, nn.AvgPool2d(1, 1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (LeNet, (2, 1, 28, 28), (5, 5)),
        (alexnet, (2, 3, 64, 64), (8, 8)),
        (vgg16, (2, 3, 32, 32), (14, 15)),
        (resnet18, (2, 3, 64, 64), (21, 30)),
    ],
)
def test_counts_that_are_known_for_public_networks(make, shape, expected):
    assert counts(plan(make(), torch.ones(shape))) == expected


def test_nothing_stands_inside_a_fused_chain():
    found = plan(Block(lambda m, x: m.b(m.relu(m.bn(m.a(x))))), torch.ones(2, 4, 8, 8))
    assert places(found) == [["model: input 0"], ["relu: output"]]


def test_a_module_used_twice_has_two_quantizers():
    found = plan(Block(lambda m, x: m.c(m.relu(m.b(m.relu(m.a(x)))))), torch.ones(2, 4, 8, 8))
    assert places(found) == [
        ["model: input 0"],
        ["model: torch.nn.functional.relu#0 output"],
        ["model: torch.nn.functional.relu#1 output"],
    ]


@pytest.mark.parametrize(
    "gate",
    [
        lambda y: y * torch.sigmoid(y),
        lambda y: y * F.relu6(y + 3) / 6,
        lambda y: y * (F.relu6(y + 3) / 6),
        F.silu,
        lambda y: F.hardswish(y, inplace=True),
    ],
)
def test_self_gated_activations_are_one_operator(gate):
    found = plan(Block(lambda m, x: m.b(gate(m.a(x)))), torch.ones(2, 4, 8, 8))
    assert len(places(found)) == 2  # the input, and what the gate returns


def test_parts_of_a_concatenation_share_a_quantizer():
    found = plan(Block(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)[:, :4])), torch.ones(2, 4, 8, 8))
    assert places(found) == [["model: input 0"], ["a: output", "b: output"]]


def test_trial_does_not_unify_at_concatenations():
    found = plan(Block(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 2))), torch.ones(2, 4, 8, 8), device="TRIAL")
    assert places(found) == [["model: input 0"], ["a: output"], ["b: output"]]


def test_a_returned_tensor_stays_as_it_is_and_its_readers_get_a_quantized_copy():
    def rest(m, x):
        y = m.a(x)
        return m.b(y), y

    found = plan(Block(rest), torch.ones(2, 4, 8, 8))
    assert places(found) == [["model: input 0"], ["b: torch.nn.functional.conv2d#0 input 0"]]


def test_quantize_outputs_and_quantize_inputs():
    model = Block(lambda m, x: m.b(m.a(x)))
    assert places(plan(model, torch.ones(2, 4, 8, 8), quantize_outputs=True))[-1] == ["b: output"]
    assert places(plan(model, torch.ones(2, 4, 8, 8), quantize_inputs=False)) == [["a: output"]]


def test_a_reader_that_wants_the_tensor_as_it_is_keeps_quantizers_below():
    def rest(m, x):
        y = m.a(x)
        return m.b(F.max_pool2d(y, 2)).mean((1, 2, 3)) + torch.softmax(y, 1).mean((1, 2, 3))

    found = places(plan(Block(rest), torch.ones(2, 4, 8, 8)))
    assert ["model: torch.max_pool2d#0 output"] in found or any("max_pool2d" in p[0] for p in found)
    assert ["a: output"] not in found


def test_splits_and_shuffles_let_quantizers_pass():
    def rest(m, x):
        left, right = m.relu(m.a(x)).chunk(2, 1)
        return m.b(torch.cat([right, left], 1))

    assert places(plan(Block(rest), torch.ones(2, 4, 8, 8))) == [["model: input 0"], ["relu: output"]]


def test_in_place_and_functional_adds():
    def rest(m, x):
        out = m.bn(m.b(m.relu(m.a(x))))
        out += x
        return m.c(m.relu(out))

    found = places(plan(Block(rest), torch.ones(2, 4, 8, 8)))
    assert ["bn: output"] in found and ["model: input 0"] in found


def test_integer_tensors_and_embeddings():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.position = nn.Embedding(10, 8), nn.Embedding(5, 8)
            self.linear = nn.Linear(8, 3)

        def forward(self, tokens):
            x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
            return self.linear(x)

    found = plan(Words(), torch.zeros(2, 5, dtype=torch.long))
    assert counts(found)[0] == 3
    assert ["model: input 0"] not in places(found)


def test_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    found = places(plan(Attention(), torch.ones(2, 5, 8)))
    assert len(found) >= 3  # input, what attention reads, what the last layer reads
    layer = plan(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.ones(2, 5, 8))
    assert counts(layer)[0] == 4  # projections in and out, two linear layers


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, *tensors):
        tensors = [norm(x) for norm, x in zip(self.norms, tensors, strict=False)]
        return self.attention(*(tensors * 3)[:3], need_weights=False)[0]


@pytest.mark.parametrize("device", ["CPU", "GPU", "NPU", "TRIAL"])
@pytest.mark.parametrize("number", [1, 3])
def test_multi_head_attention_is_quantized_inside(number, device):
    inputs = [torch.ones(2, 5, 8)] * number
    found = plan(CrossAttention(), *inputs, device=device)
    # One tensor for all three has one quantizer.
    assert [[f"norms.{index}: output"] in places(found) for index in range(3)] == [index < number for index in range(3)]
    # Queries and keys, where they have been made, if the device has a fused attention; what the last projection reads.
    inside = [place for group in places(found) for place in group if place.startswith("attention")]
    made = [f"attention: torch.nn.functional.linear#{index} output" for index in range(2) if device in ("CPU", "NPU")]
    assert inside == [*made, "attention: torch.nn.functional.scaled_dot_product_attention#0 output"]
    assert {q.parameter for q in found.quantizers if q.group == "weights"} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }


def test_weights_without_a_layer_are_found_by_their_use():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(4, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.kernel)

    found = plan(Functional(), torch.ones(2, 3, 4, 4))
    assert [q.parameter for q in found.quantizers if q.group == "weights"] == ["kernel"]


def test_layers_that_no_example_reaches_are_left_alone_and_listed():
    found = plan(Block(lambda m, x: m.a(x)), torch.ones(2, 4, 8, 8))
    assert found.skipped == {"b.weight": "no example input reaches it", "c.weight": "no example input reaches it"}


def test_a_plan_survives_json():
    import json

    found = plan(resnet18(), torch.ones(2, 3, 64, 64), initializer={"range": {"type": "percentile"}})
    again = [PlannedQuantizer.from_dict(json.loads(json.dumps(q.to_dict()))) for q in found.quantizers]
    assert again == found.quantizers


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x, way):
        return self.other(x.relu()) if way else self.second(self.first(x))


def test_the_first_convolution_is_the_first_of_each_example():
    model, x = TwoWays(), torch.ones(2, 3, 4, 4)
    config = QuantizationConfig.model_validate({"algorithm": "quantization", "overflow_fix": "first_layer_only"})
    recorded = trace(model, [(x, True), (x, False)])
    found = Planner(model, recorded, config, load_profile("CPU"), ScopeFilter(model)).plan()
    half = {q.parameter for q in found.quantizers if q.spec.half_range}
    assert half == {"first.weight", "other.weight"}


def test_asymmetric_activations_with_attention_that_offers_symmetric_ones_alone():
    inputs, asked = [torch.randn(2, 5, 8)], {"mode": "asymmetric"}
    with pytest.raises(ConfigError, match=r"scaled_dot_product_attention\|INPUT1.*scope_overrides.activations"):
        plan(CrossAttention(), *inputs, device="CPU", activations=asked)
    override = {"activations": {"{re}scaled_dot_product": {"mode": "symmetric"}}}
    found = plan(CrossAttention(), *inputs, device="CPU", activations=asked, scope_overrides=override)
    symmetric = {q.name for q in found.quantizers if q.group == "activations" and q.spec.mode == "symmetric"}
    assert symmetric == {"attention/linear#0|OUTPUT", "attention/linear#1|OUTPUT"}
