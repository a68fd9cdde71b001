"""Where quantizers stand: counts that are known for public networks, and rules on small ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.scopes import ScopeFilter
from compress_core.trace import trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.plan import PlannedQuantizer, QuantizationPlan
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile
from examples.common.networks import resnet18


def plan(model: nn.Module, *inputs: torch.Tensor, device: str = "ANY", **section) -> QuantizationPlan:
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    recorded = trace(model, inputs if len(inputs) > 1 else inputs[0], training=True)
    return Planner(model, recorded, config, load_profile(device), ScopeFilter(model)).plan()


def counts(found: QuantizationPlan) -> tuple[int, int]:
    weights = [q for q in found.quantizers if q.group == "weights"]
    return len(weights), len(found.quantizers) - len(weights)


def places(found: QuantizationPlan) -> list[list[str]]:
    return [[str(place) for place in q.places] for q in found.quantizers if q.group == "activations"]


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


class Block(nn.Module):
    """conv-bn-relu, residual add, and whatever a test makes of the rest."""

    def __init__(self, rest):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.rest = rest

    def forward(self, *inputs):
        return self.rest(self, *inputs)


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
        return m.b(F.max_pool2d(y, 2)).mean() + torch.softmax(y, 1).mean()

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


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_attention_are_left_alone(need_weights):
    def forward(model, x):
        causal = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        padding = torch.zeros(2, 5, device=x.device).masked_fill(x[:, :, 0] > 1, -torch.inf)
        return model.a(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=need_weights)[0]

    model = Block(forward)
    model.a = nn.MultiheadAttention(8, 2, batch_first=True)
    found = [place for group in places(plan(model, torch.randn(2, 5, 8))) for place in group]
    assert not any("add" in place or "masked_fill" in place or "baddbmm" in place for place in found)
    assert len(found) == (7 if need_weights else 4)


def test_what_a_learned_bias_of_attention_is_computed_from_is_quantized():
    def forward(m, x):
        pair = m.b((x @ x.transpose(1, 2)).unsqueeze(1).expand(-1, 4, -1, -1))[:, :2].flatten(0, 1)
        return m.attention(x, x, x, attn_mask=pair, need_weights=False)[0]

    model = Block(forward)
    model.b, model.attention = nn.Conv2d(4, 4, 1), nn.MultiheadAttention(8, 2, batch_first=True)
    found = places(plan(model, torch.randn(2, 5, 8)))
    assert ["model: torch.Tensor.matmul#0 output"] in found  # what the convolution reads
    assert not any(place.startswith("b:") for group in found for place in group)  # the bias itself is a mask


MASKED = {
    "filled": lambda m, scores, keep: scores.masked_fill(keep == 0, -1e9),
    "filled, then scaled": lambda m, scores, keep: scores.masked_fill(keep == 0, -1e9) * m.factor,
    "with a relative bias": lambda m, scores, keep: scores + (m.bias.weight + (1.0 - keep) * LOWEST),
    "like the scores": lambda m, scores, keep: scores + torch.zeros_like(scores).masked_fill_(keep == 0, -torch.inf),
    "lower bound": lambda m, scores, keep: torch.max(scores + (1.0 - keep) * LOWEST, torch.tensor(LOWEST)),
    "without its maximum": lambda m, scores, keep: stable(scores.masked_fill(keep == 0, -torch.inf)),
}


def stable(scores):
    return scores - scores.max(-1, keepdim=True)[0]


@pytest.mark.parametrize("kind", MASKED)
def test_scores_that_are_masked_are_left_alone(kind):
    def forward(m, x, keep):
        scores = MASKED[kind](m, m.q(x) @ m.k(x).transpose(1, 2), keep[:, None].expand(-1, 6, -1))
        return m.out(scores.softmax(-1) @ m.v(x))

    model = Block(forward)
    model.q, model.k, model.v, model.out = (nn.Linear(8, 8) for _ in range(4))
    model.factor, model.bias = nn.Parameter(torch.ones(6, 6)), nn.Embedding(6, 6)
    keep = torch.tensor([[1.0, 1, 1, 1, 1, 0]] * 3)
    found = {place for group in places(plan(model, torch.randn(3, 6, 8), keep)) for place in group}
    probabilities, out = "model: torch.Tensor.softmax#0 output", "model: torch.Tensor.matmul#1 output"
    assert found == {"model: input 0", "q: output", "k: output", probabilities, "v: output", out}


@pytest.mark.parametrize(
    "pool",
    [
        lambda y, drop: F.max_pool2d(F.pad(y, (0, 1, 0, 1), value=-torch.inf), 3, 2),
        lambda y, drop: F.max_pool2d(y.masked_fill(drop, -1e9), 2),
        lambda y, drop: F.adaptive_max_pool2d(y.masked_fill(drop, -torch.inf), 2),
        lambda y, drop: y.masked_fill(drop, -1e9).amax(3, keepdim=True),
        lambda y, drop: y.masked_fill(drop, -1e9).max(3, keepdim=True)[0],
    ],
)
def test_maxima_over_what_is_masked_are_quantized_behind(pool):
    model = Block(lambda m, x: m.last(pool(m.first(x), x[:, :1] > 3)))
    model.first, model.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    input_place, pooled = places(plan(model, torch.randn(2, 3, 8, 8)))
    assert input_place == ["model: input 0"]
    assert any(name in pooled[0] for name in ("max_pool2d", "amax", "max#0 output")) and "masked_fill" not in pooled[0]


@pytest.mark.parametrize(
    "scaled", [lambda m, x: (x - m.mean) / 255, lambda m, x: torch.minimum(torch.maximum(x, m.mean), -m.mean)]
)
def test_large_numbers_that_are_no_mask(scaled):
    model = Block(lambda m, x: m.last(x := scaled(m, x)) + x)
    model.last = nn.Conv2d(3, 3, 1)
    model.register_buffer("mean", torch.full((3, 1, 1), -2e4))
    found = plan(model, torch.randn(2, 3, 4, 4))
    model.mean.fill_(-2)
    assert places(found) == places(plan(model, torch.randn(2, 3, 4, 4))) and len(places(found)) >= 2


LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "finfo.min": lambda m: (1.0 - m.float()) * LOWEST,
    "a large number": lambda m: (1.0 - m.float()) * -10000,
    "negated first": lambda m: -1e9 * (m == 0).float(),
    "infinity": lambda m: torch.zeros_like(m, dtype=torch.float32).masked_fill(m == 0, -torch.inf),
    "triangle": lambda m: torch.triu(torch.full((6, 6), -torch.inf, device=m.device), 1)[None].expand(len(m), -1, -1),
    "where": lambda m: torch.where(m == 0, LOWEST, 0.0),
    "assigned": lambda m: assigned(m),
    "subtracted": lambda m: -(1e30 * (1.0 - m.float())),
    "shape of an activation": lambda m: (
        torch.zeros(6, 6).new_full((6, 6), -torch.inf).triu(1)[None].expand(len(m), -1, -1)
    ),
    "logarithm": lambda m: (m > 0).float().log(),
    "logarithm of a view": lambda m: torch.log((m != 0)[:, None].expand(-1, 6, -1).to(torch.float32)),
    "sum": lambda m: torch.full((6, 6), -1e30, device=m.device).triu(1) + ((1.0 - m.float()) * -1e30)[:, None],
}


def assigned(mask):
    found = torch.zeros(6, 6, device=mask.device)
    found[torch.ones(6, 6, dtype=torch.bool, device=mask.device).triu(1)] = -torch.inf
    return found[None].expand(len(mask), -1, -1)


class WrittenAttention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mask = mask

    def forward(self, x, mask):
        mask = self.mask(mask)
        scores = self.q(x) @ self.k(x).transpose(1, 2) + (mask if mask.dim() == 3 else mask[:, None])
        return self.out(scores.softmax(-1) @ self.v(x))


@pytest.mark.parametrize("compared", [False, True])
def test_masks_that_a_buffer_holds_are_left_alone(compared):
    def mask(m):
        part = model.causal[: m.shape[1], : m.shape[1]].expand(len(m), -1, -1)
        return torch.zeros_like(part).masked_fill(part < 0, -torch.inf) if compared else part

    model = WrittenAttention(mask)
    model.register_buffer("causal", torch.full((9, 9), -torch.inf).triu(1))
    model.register_buffer("empty", torch.ones(0))
    inputs = torch.randn(3, 6, 8), torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)
    assert {place for group in places(plan(model, *inputs)) for place in group} == {
        "model: input 0",
        *(f"{layer}: output" for layer in "qkv"),
        "model: torch.Tensor.softmax#0 output",
        "model: torch.Tensor.matmul#1 output",
    }


@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_the_code_computes_are_left_alone(kind):
    x, mask = torch.randn(3, 6, 8), torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)
    found = places(plan(WrittenAttention(MASKS[kind]), x, mask))
    # Input, queries, keys, values, softmax, what the last layer reads: nothing at the sum of scores and mask.
    assert len(found) == 6
    assert [group[0].split(":")[0] for group in found] == ["model", "q", "k", "model", "v", "model"]
    assert [name in found[index][0] for index, name in ((0, "input 0"), (3, "softmax"), (5, "matmul"))] == [True] * 3
    model = WrittenAttention(MASKS[kind]).eval()
    expected = model(x, mask)
    document = {"compression": {"algorithm": "quantization"}}
    _, model = create_compressed_model(model, document, init_loader=[((x, mask), 0)])
    assert (model.eval()(x, mask) - expected).norm() < 0.1 * expected.norm()


def test_other_large_numbers_are_no_masks():
    def forward(m, x):
        return m.a(x * 32768.0 + 1.0) + m.b(x).clamp(-1e5, 1e5)

    assert len(places(plan(Block(forward), torch.ones(2, 4, 8, 8)))) == len(
        places(plan(Block(lambda m, x: m.a(x * 3.0 + 1.0) + m.b(x).clamp(-1, 1)), torch.ones(2, 4, 8, 8)))
    )


SEVERAL_WEIGHTS = {
    "lstm": (lambda: nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), 8),
    "gru": (lambda: nn.GRU(8, 4, batch_first=True), 2),
    "attention": (lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True), 2),
    "attention of other widths": (lambda: Unpacked(), 4),
}


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(8, 2, kdim=6, vdim=8, batch_first=True)

    def forward(self, x):
        return self.attention(x, self.key(x[..., :6]), x)[0]


@pytest.mark.parametrize("kind", SEVERAL_WEIGHTS)
def test_quantizers_of_layers_with_several_weights_have_names_of_their_own(kind):
    make, number = SEVERAL_WEIGHTS[kind]
    layer = make()
    if isinstance(layer, nn.MultiheadAttention):
        model = Block(lambda m, x: m.a(x, x, x)[0])
    else:
        model = Block(lambda m, x: m.a(x)[0] if isinstance(m.a, nn.RNNBase) else m.a(x))
    model.a = layer
    found = [q.name for q in plan(model, torch.ones(2, 5, 8)).quantizers]
    assert len(set(found)) == len(found)
    weights = [name for name in found if name.endswith("|WEIGHT")]
    assert len(weights) == number
    chosen = weights[0].removesuffix("|WEIGHT")
    bits = {q.name: q.spec.bits for q in plan(model, torch.ones(2, 5, 8), **of_bits(chosen)).quantizers}
    assert [name for name, value in bits.items() if value == 4] == [weights[0]]


def of_bits(name):
    return {
        "device": "TRIAL",
        "initializer": {"precision": {"type": "manual", "bitwidth_per_scope": [[4, f"{name}|WEIGHT"]]}},
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


# Scopes.


class Scoped(nn.Module):
    """A model with every kind of place that a scope can name."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.branch = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.features(x)
        x = x + self.branch(x)
        x = F.relu(x + 1.0)
        return self.head(self.pool(x).flatten(1))


def names(scopes=None, **section):
    model = Scoped()
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    recorded = trace(model, torch.ones(2, 3, 4, 4), training=True)
    scope_filter = ScopeFilter(model, {str(i): scope for i, scope in enumerate(scopes or [])})
    planner = Planner(model, recorded, config, load_profile("ANY"), scope_filter)
    scope_filter.check(planner.scope_candidates)
    return {quantizer.name for quantizer in planner.plan().quantizers}


EVERYTHING = {
    "features.0|WEIGHT",
    "branch|WEIGHT",
    "head|WEIGHT",
    "model/input 0|OUTPUT",
    "features.1|OUTPUT",
    "branch|OUTPUT",
    "model/relu#1|OUTPUT",
    "pool|OUTPUT",
}


@pytest.mark.parametrize(
    ("scope", "removed"),
    [
        ("head", {"head|WEIGHT", "pool|OUTPUT"}),
        ("Scoped/NNCFLinear[head]/linear_0", {"head|WEIGHT", "pool|OUTPUT"}),
        ("features", {"features.0|WEIGHT", "model/input 0|OUTPUT"}),
        ("pool", {"model/relu#1|OUTPUT"}),
        # The quantizer that the addition shared with the branch now stands at the input of the branch alone.
        ("Scoped/__add___0", {"branch|OUTPUT", "features.1|OUTPUT"}),
        ("Scoped/AvgPool2d[pool]/avg_pool2d_0", {"model/relu#1|OUTPUT"}),
        ("{re}Linear", {"head|WEIGHT", "pool|OUTPUT"}),
    ],
)
def test_an_ignored_scope_removes_the_weight_and_the_input_of_a_layer(scope, removed):
    assert names() == EVERYTHING
    assert EVERYTHING - names([scope]) == removed


def test_regular_expressions_find_functions_under_all_their_names():
    assert names(["{re}__add___0$"]) == names(["Scoped/__add___0"])
    assert names(["{re}__add__"]) == names(["{re}^add$"])


def test_a_scope_without_a_match_is_an_error():
    with pytest.raises(ConfigError, match="'Scoped/__add___7' matches no layer"):
        names(["Scoped/__add___7"])


@pytest.mark.parametrize(
    ("entry", "quantizer"),
    [
        ("pool|OUTPUT", "pool|OUTPUT"),
        ("Scoped/AvgPool2d[pool]/avg_pool2d_0|OUTPUT", "pool|OUTPUT"),
        ("Scoped/Sequential[features]/ReLU[1]/relu_0|OUTPUT", "features.1|OUTPUT"),
        ("model/input 0|OUTPUT", "model/input 0|OUTPUT"),
        ("/nncf_model_input_0|OUTPUT", "model/input 0|OUTPUT"),
        ("model/relu#1|OUTPUT", "model/relu#1|OUTPUT"),
        ("{re}pool\\|OUTPUT", "pool|OUTPUT"),
    ],
)
def test_bits_can_be_given_to_quantizers_as_they_are_printed_or_as_nncf_does(entry, quantizer):
    precision = {"bitwidth_per_scope": [[4, entry]]}
    found = plan(Scoped(), torch.ones(2, 3, 4, 4), device="TRIAL", initializer={"precision": precision})
    assert {q.name: q.spec.bits for q in found.quantizers if q.spec.bits != 8} == {quantizer: 4}


class AddsTwice(nn.Module):
    def forward(self, x):
        return (x + 1) * x + x


def test_the_printed_name_of_a_call_means_that_call_alone():
    model = nn.Sequential(AddsTwice(), AddsTwice(), nn.Conv2d(3, 3, 1))
    everything = [q.name for q in plan(model, torch.ones(2, 3, 4, 4)).quantizers]
    assert {"0/torch.Tensor.mul#0|OUTPUT", "1/torch.Tensor.mul#0|OUTPUT"} < set(everything)
    for name in [name for name in everything if "#" in name]:
        precision = {"bitwidth_per_scope": [[4, name]]}
        found = plan(model, torch.ones(2, 3, 4, 4), device="TRIAL", initializer={"precision": precision})
        assert [q.name for q in found.quantizers if q.spec.bits != 8] == [name]


def test_a_layer_whose_function_another_module_calls_goes_by_its_own_name():
    model = Block(lambda m, x: m.attention(x, x, x, need_weights=False)[0])
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    everything = {q.name for q in plan(model, x).quantizers}
    left = {q.name for q in plan(model, x, activations={"ignored_scopes": ["attention.out_proj"]}).quantizers}
    assert everything - left == {"attention/scaled_dot_product_attention#0|OUTPUT"}
    override = {"scope_overrides": {"activations": {"attention.out_proj": {"bits": 4}}}}
    found = plan(model, x, device="TRIAL", **override).quantizers
    assert [q.name for q in found if q.spec.bits == 4] == ["attention/scaled_dot_product_attention#0|OUTPUT"]


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


def plan_without(model: nn.Module, *inputs: torch.Tensor, ignored: str) -> QuantizationPlan:
    config = QuantizationConfig.model_validate({"algorithm": "quantization"})
    recorded = trace(model, inputs if len(inputs) > 1 else inputs[0], training=True)
    scopes = ScopeFilter(model, {"ignored_scopes.0": ignored})
    planner = Planner(model, recorded, config, load_profile("ANY"), scopes)
    scopes.check(planner.scope_candidates)
    return planner.plan()


class AddsInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = AddsTwice(), nn.Conv2d(3, 3, 1)

    def forward(self, x, y):
        return self.last(self.first(x) + y)


@pytest.mark.parametrize("section", [True, False])
@pytest.mark.parametrize(
    ("entry", "removed"),
    [
        ("model/torch.Tensor.add#2", "model/torch.Tensor.add#2|OUTPUT"),
        ("first/torch.Tensor.add#1 input 1", "first/torch.Tensor.add#1 input 1|INPUT0"),
        ("first/torch.Tensor.mul#0", "first/torch.Tensor.mul#0|OUTPUT"),
        ("model/input 1", "model/input 1|OUTPUT"),
        ("/nncf_model_input_1", "model/input 1|OUTPUT"),
        *((name, name) for name in ("first|OUTPUT", "first/torch.Tensor.mul#0|OUTPUT", "model/input 1|OUTPUT")),
        ("last|WEIGHT", "last|WEIGHT"),
    ],
)
def test_quantizers_can_be_ignored_by_their_own_name(entry, removed, section):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    everything = {q.name for q in plan(model, *inputs).quantizers}
    if section:
        group = "weights" if "WEIGHT" in entry else "activations"
        found = plan(model, *inputs, **{group: {"ignored_scopes": [entry]}})
    else:
        found = plan_without(model, *inputs, ignored=entry)
    assert everything - {q.name for q in found.quantizers} == {removed}
    assert "ignored by" in str(found.skipped)


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("first/torch.Tensor.mul#0", "first/torch.Tensor.mul#0|OUTPUT"),
        ("first|OUTPUT", "first|OUTPUT"),
        ("model/input 1|OUTPUT", "model/input 1|OUTPUT"),
        ("/nncf_model_input_1", "model/input 1|OUTPUT"),
        ("last|WEIGHT", "last|WEIGHT"),
    ],
)
def test_settings_can_be_overridden_for_quantizers_by_their_own_name(scope, changed):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    override = {"bits": 4, "mode": "asymmetric", "initializer": {"range": {"type": "percentile"}}}
    group = "weights" if "WEIGHT" in scope else "activations"
    found = plan(model, *inputs, device="TRIAL", scope_overrides={group: {scope: override}})
    settings = {q.name: (q.spec.bits, q.spec.mode, q.initial_range.type) for q in found.quantizers}
    assert settings.pop(changed) == (4, "asymmetric", "percentile")
    assert all(bits == 8 and mode == "symmetric" and kind != "percentile" for bits, mode, kind in settings.values())


def test_an_override_that_a_quantizer_cannot_have_is_refused_with_its_path():
    with pytest.raises(ConfigError, match=r"scope_overrides.activations.first\|OUTPUT.bits: .*4 bits"):
        plan(AddsInputs(), *torch.ones(2, 2, 3, 4, 4), scope_overrides={"activations": {"first|OUTPUT": {"bits": 4}}})


def test_an_override_for_what_demands_nothing_is_not_taken_for_used():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    with pytest.raises(ConfigError, match="the scope '1' matches no quantizer"):
        plan(model, torch.ones(2, 3, 4, 4), device="TRIAL", scope_overrides={"activations": {"1": {"bits": 4}}})


def test_names_of_calls_mean_the_calls_of_that_module():
    class Inner(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.tanh(x))

    model = Block(lambda m, x: m.last(torch.tanh(m.inner(m.inner(x)))))
    model.inner, model.last = Inner(nn.Linear(4, 4)), nn.Linear(4, 4)
    precision = {"bitwidth_per_scope": [[4, "Block/tanh_0|OUTPUT"]]}
    found = plan(model, torch.ones(2, 4), device="TRIAL", initializer={"precision": precision})
    assert [q.name for q in found.quantizers if q.spec.bits == 4] == ["model/torch.tanh#2|OUTPUT"]


def test_what_is_ignored_twice_is_no_error():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), torch.ones(2, 3, 4, 4)
    config = QuantizationConfig.model_validate(
        {
            "algorithm": "quantization",
            "weights": {"ignored_scopes": ["0", "0|WEIGHT"]},
            "activations": {"ignored_scopes": ["0"]},
        }
    )
    scopes = ScopeFilter(model, {"ignored_scopes.0": "0", "ignored_scopes.1": "0|WEIGHT"})
    found = Planner(model, trace(model, x), config, load_profile("ANY"), scopes).plan()
    assert {q.name for q in found.quantizers} == {"1|WEIGHT", "0|OUTPUT"}


def test_problems_of_planning_have_paths_in_the_document():
    section = {"algorithm": "quantization", "weights": {"ignored_scopes": ["1|WEIGHT"]}}
    document = {"input_info": {"sample_size": [2, 3, 4, 4]}, "compression": section}
    with pytest.raises(ConfigError) as caught:
        create_compressed_model(nn.Sequential(nn.Conv2d(3, 3, 1)), document)
    assert caught.value.problems[0].path == "compression.quantization.weights.ignored_scopes.0"


@pytest.mark.parametrize("entry", ["model/torch.Tensor.add#3", "/nncf_model_input_2", "model/input 9"])
def test_a_quantizer_that_there_is_not_cannot_be_ignored(entry):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    with pytest.raises(ConfigError, match=f"'{entry}' is nothing that would be quantized"):
        plan_without(model, *inputs, ignored=entry)
    with pytest.raises(ConfigError, match=f"'{entry}' matches no quantizer"):
        plan(model, *inputs, activations={"ignored_scopes": [entry]})
