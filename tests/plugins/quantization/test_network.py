"""What is part of the network, and what only surrounds it: constants, numbers, indices, positions, losses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model, register_default_init_args
from tests.placement_helpers import Block, counts, places, plan


def flat(found):
    return [place for group in places(found) for place in group]


def compressed(model, batches, **section):
    initializer = {"range": {"num_init_samples": 16, "type": "min_max"}}
    config = {"compression": {"algorithm": "quantization", "initializer": initializer, **section}}
    return create_compressed_model(model, register_default_init_args(config, batches))


# Scale and shift by constants, however these are computed.


class Affine(nn.Module):
    """A scale and a shift for each channel, as a frozen batch norm or a LayerScale computes them."""

    def __init__(self, function, channels, dims):
        super().__init__()
        self.function, self.shape = function, (1, -1) + (1,) * dims
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def column(self, name):
        return getattr(self, name).view(self.shape)

    def forward(self, x):
        return self.function(self, x)


def frozen(m, x):
    scale = m.column("weight") * (m.column("var") + 1e-5).rsqrt()
    return x * scale + (m.column("bias") - m.column("mean") * scale)


AFFINE = {
    "frozen batch norm": frozen,
    "step by step": lambda m, x: (x - m.column("mean")) / torch.sqrt(m.column("var") + 1e-5) * m.column("weight"),
    "in place": lambda m, x: x.mul_(m.column("weight")).add_(m.column("bias")),
    "addcmul": lambda m, x: torch.addcmul(m.column("bias"), x, m.column("weight")) * m.column("gamma"),
    "F.batch_norm": lambda m, x: F.batch_norm(x, m.mean * 2, m.var * 2, m.weight, m.bias, False),
    "parameter": lambda m, x: x * m.column("gamma") + m.column("bias"),
    "from the constant": lambda m, x: m.column("bias") - m.column("gamma") * x,
    "exponential": lambda m, x: x * m.column("gamma").exp(),
    "made on the spot": lambda m, x: x * torch.tensor(0.5) + torch.linspace(0, 1, 8).view(m.shape),
    "expanded": lambda m, x: x * m.column("gamma").expand_as(x),
    "another dtype": lambda m, x: x * m.column("gamma").double().to(x.dtype),
}


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize(("layer", "dims"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3), (nn.Linear, 0)])
def test_scale_and_shift_by_constants_are_fused(kind, layer, dims):
    arguments = () if layer is nn.Linear else (1,)
    first, second, last = layer(3, 8, *arguments), layer(8, 8, *arguments), layer(8, 4, *arguments)
    affine = [Affine(AFFINE[kind], 8, dims) for _ in range(2)]
    model = nn.Sequential(first, affine[0], nn.ReLU(), second, affine[1], nn.ReLU(), last)
    found = plan(model, torch.randn((2, 3) + (4,) * dims))
    assert places(found) == [["model: input 0"], ["2: output"], ["5: output"]]


def test_scales_that_depend_on_the_input_are_not_constants():
    model = Block(lambda m, x: m.b(m.a(x) * m.c(x).sigmoid()))
    assert places(plan(model, torch.ones(2, 4, 8, 8)))[1:] == [
        ["a: output"],
        ["model: torch.Tensor.sigmoid#0 output"],
        ["model: torch.Tensor.mul#0 output"],
    ]


def test_a_frozen_batch_norm_is_as_accurate_as_a_batch_norm():
    torch.manual_seed(0)

    def network(norm):
        return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3))

    norm = nn.BatchNorm2d(8).eval()
    norm.running_mean.copy_(torch.randn(8)), norm.running_var.copy_(torch.logspace(-2, 2, 8))
    model = network(norm)
    other = Affine(frozen, 8, 2)
    other.load_state_dict(
        {
            "gamma": norm.weight,
            "weight": norm.weight,
            "bias": norm.bias,
            "mean": norm.running_mean,
            "var": norm.running_var,
        }
    )
    by_hand = network(other)
    by_hand[0].load_state_dict(model[0].state_dict()), by_hand[3].load_state_dict(model[3].state_dict())
    batches = [(torch.randn(4, 3, 12, 12), 0) for _ in range(2)]
    results = [compressed(m, batches)[1].eval()(batches[0][0]) for m in (model, by_hand)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


# Constants and numbers: their range in an example proves nothing.


class Rotary(nn.Module):
    """Attention with rotary positions, as in Llama."""

    def __init__(self, given=False):
        super().__init__()
        self.qkv, self.out, self.given = nn.Linear(8, 24), nn.Linear(8, 8), given
        self.register_buffer("frequencies", 1 / 100 ** (torch.arange(0, 8, 2) / 8))

    def forward(self, x, positions=None):
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        phases = (self.frequencies[None, :, None].float() @ positions[:, None, :].float()).transpose(1, 2)
        phases = torch.cat([phases, phases], -1)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (t * phases.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * phases.sin() for t in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v))


def error(model, plain, *inputs):
    with torch.no_grad():
        expected = plain(*inputs)
        return ((model(*inputs) - expected).abs().mean() / expected.abs().mean()).item()


@pytest.mark.parametrize("given", [False, True])
def test_rotary_positions_are_right_beyond_the_calibrated_length(given):
    torch.manual_seed(0)

    def inputs(length):
        x = torch.randn(4, length, 8)
        return (x, torch.arange(length)[None].expand(4, -1).clone()) if given else (x,)

    model = Rotary().eval()
    plain = copy.deepcopy(model)
    _, model = compressed(model, [inputs(16)] * 2)
    short, long = (error(model.eval(), plain, *inputs(length)) for length in (16, 300))
    assert long < 1.5 * short < 0.15


def embedding(t, dim=8):
    phases = t[:, None].float() * torch.exp(-torch.arange(dim // 2) * 1.5)[None]
    return torch.cat([phases.sin(), phases.cos()], -1)


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
@pytest.mark.parametrize("scale", [lambda t: t, lambda t: 1000 * (t / 1000), lambda t: t * 0.5 + 1])
def test_time_steps_stay_apart(dtype, scale):
    """At most as far from the plain model as the same network on the embedded steps, at steps never calibrated."""
    torch.manual_seed(0)
    model = Block(lambda m, t: m.b(m.relu(m.a(embedding(scale(t))))))
    model.a, model.b = nn.Linear(8, 16), nn.Linear(16, 4)
    plain = copy.deepcopy(model).eval()
    found, model = compressed(model, [(torch.arange(0, 700, 50).to(dtype), 0)])
    assert len(found.non_weight_quantizers) == 2  # what the layers read
    assert error(model.eval(), plain, torch.tensor([699, 700, 701, 999]).to(dtype)) < 0.05


def test_phases_of_coordinates_are_exact():
    """SIREN and Fourier features: a grid of 8 bits would leave 256 different coordinates."""
    model = nn.Sequential(nn.Linear(2, 8), Block(lambda m, x: torch.sin(30 * x)), nn.Linear(8, 3))
    assert places(plan(model, torch.rand(5, 2))) == [["1: output"]]


def test_a_layer_whose_exponential_is_returned_is_quantized():
    model = Block(lambda m, x: m.a(x).exp())
    assert places(plan(model, torch.rand(2, 4, 3, 3))) == [["model: input 0"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda m, x: x + torch.arange(x.shape[1]).float().view(1, -1, 1, 1),
        lambda m, x: x * (torch.ones(x.shape[-1]).cumsum(0) / 7 - 1),
        lambda m, x: x + m.position(torch.arange(x.shape[-1])).mean(-1),
        lambda m, x: x + torch.zeros_like(x).cumsum(-1),
        lambda m, x: x * m.mlp(torch.linspace(-1, 1, 8)[:, None])[:, 0],
        lambda m, x: x * (x.new_ones(8) * 3).sqrt().expand_as(x),
    ],
)
def test_what_is_computed_from_constants_has_no_quantizer(make):
    model = Block(lambda m, x: m.b(F.softmax(make(m, m.relu(m.a(x))), 1)))
    model.position, model.mlp = nn.Embedding(20, 4), nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    found = plan(model, torch.ones(2, 4, 8, 8))
    assert places(found) == [["model: input 0"], ["model: torch.nn.functional.softmax#0 output"]]


def test_numbers_that_meet_activations_have_no_quantizer():
    def forward(m, x, lengths):
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).float()[..., None]
        h = m.a(x) * mask
        return m.b(h.sum(1) / lengths[:, None].float())

    model = Block(forward)
    model.a, model.b = nn.Linear(8, 8), nn.Linear(8, 4)
    found = flat(plan(model, torch.randn(3, 5, 8), torch.tensor([5, 3, 2])))
    assert found == [
        "model: input 0",
        "a: output",
        "model: torch.Tensor.mul#0 output",
        "model: torch.Tensor.sum#0 output",
        "model: torch.Tensor.div#0 output",
    ]


def test_a_constant_that_is_a_factor_of_a_product_or_part_of_a_concatenation_is_quantized():
    def forward(m, x):
        x = m.d(torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1))
        return m.b(F.scaled_dot_product_attention(m.c(m.query[None]).expand(len(x), -1, -1), x, x))

    model = Block(forward)
    model.a, model.b, model.c, model.d = (nn.Linear(8, 8) for _ in range(4))
    model.token, model.query = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.ones(3, 8))
    found = places(plan(model, torch.randn(2, 5, 8)))
    # Constants are quantized where they are read: the model may keep them.
    assert ["model: torch.cat#0 input 0.0", "a: output"] in found
    assert ["model: torch.nn.functional.scaled_dot_product_attention#0 input 0"] in found
    # The layer that makes the queries from constants is computed once, and not with integers.
    assert "c: torch.nn.functional.linear#0 input 0" not in [place for group in found for place in group]


def test_inputs_that_the_trace_does_not_see_are_no_constants():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, rows):
            return self.b(self.a(torch.tensor(rows)))

    from compress_core.data.examples import Example
    from compress_core.trace import trace
    from compress_quantization.network import Network

    model = Words()
    forward = trace(model, Example.of([[1.0, 2.0, 3.0, 4.0]])).forwards[0]
    assert [call.function for call in forward.calls if call.index not in Network(forward).outside] == [
        "torch.nn.functional.linear"
    ] * 2


# Indices, comparisons and positions.


INDICES = {
    "long": lambda m, y: y[..., (torch.arange(y.shape[-1]).float() * 0.5).long()],
    "of an input": lambda m, y: y.gather(-1, (y.abs().sum(1, keepdim=True) * 0.3 + 1).clamp(0, 7).long().expand_as(y)),
    "argmax": lambda m, y: y * F.one_hot((y + 1).argmax(1), 4).movedim(-1, 1),
    "largest": lambda m, y: y.gather(1, torch.max(y * 2 - 1, 1, keepdim=True)[1].expand_as(y)),
    "bucket": lambda m, y: m.table(torch.bucketize(y * 3, torch.arange(9.0))).sum(-1) + F.softmax(y, 1),
    "comparison": lambda m, y: F.softmax(y, 1).masked_fill(y + y.mean() > 3, 0.0),
    "sampled": lambda m, y: F.grid_sample(y, F.affine_grid(m.theta(y), y.shape, align_corners=False) * 0.9),
    "rounded": lambda m, y: F.softmax(y, 1) + m.table((y * 3 + 2).floor().clamp(0, 8).long()).sum(-1),
}


@pytest.mark.parametrize("kind", INDICES)
def test_what_ends_in_indices_is_not_quantized(kind):
    model = Block(lambda m, x: m.b(INDICES[kind](m, m.relu(m.a(x)))))
    model.table = nn.Embedding(10, 4)
    model.theta = lambda y: (model.c(y).mean((2, 3)) @ torch.ones(4, 6)).view(-1, 2, 3)
    found = flat(plan(model, torch.ones(2, 4, 8, 8)))
    names = ("float", "abs", "argmax", ": torch.max", "bucketize", "gt", "affine_grid", "floor", "clamp")
    assert not [place for place in found if any(name in place for name in names)], found


def test_indices_are_those_of_the_plain_model():
    class Resample(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 1, 1)

        def forward(self, x):
            index = (torch.arange(x.shape[-1]).float() * 0.5).long()
            return self.out(torch.relu(self.conv(x))[..., index]), index

    torch.manual_seed(0)
    model, x = Resample().eval(), torch.randn(2, 1, 400)
    plain = copy.deepcopy(model)
    _, model = compressed(model, [(x, 0)])
    assert torch.equal(model.eval()(x)[1], plain(x)[1])


def test_a_comparison_reads_what_other_readers_need():
    model = Block(lambda m, x: m.b(m.a(x)).masked_fill(x[:, :1] > 3, 0.0))
    assert places(plan(model, torch.ones(2, 4, 8, 8)))[0] == ["model: input 0"]


# Positions that are decoded after the last layer.


def boxes(m, y):
    """Boxes from distances to the points of a grid, as in FCOS and YOLO."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    grid = torch.stack([rows, columns]) * 8
    distances = y * 1.5
    low, high = grid - distances[:, :2], grid + distances[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)


def expected_position(m, y):
    return (F.softmax((y + y.roll(1, 1)).flatten(2), -1) * torch.arange(64.0)).sum(-1)


@pytest.mark.parametrize("decode", [boxes, expected_position])
def test_decoded_positions_are_not_quantized(decode):
    model = Block(lambda m, x: decode(m, m.b(m.relu(m.a(x)))))
    assert places(plan(model, torch.ones(2, 4, 8, 8))) == [["model: input 0"], ["relu: output"]]


def test_positions_that_a_layer_reads_are_activations():
    """A network for coordinates of pixels is a network like any other."""
    model = Block(lambda m, x: m.b(torch.cat([m.a(x), torch.linspace(0, 1, 8).expand(2, 1, 8, 8)], 1)[:, 1:]))
    assert len(flat(plan(model, torch.ones(2, 4, 8, 8)))) == 3


# Losses.


class WithLoss(nn.Module):
    """A network that returns its loss if it is given labels, as those of Hugging Face do."""

    def __init__(self, loss):
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(8, 16), nn.Linear(16, 4), loss

    def forward(self, x, labels=None):
        logits = self.head(F.relu(self.body(x)))
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def iou(logits, labels):
    low = torch.maximum(logits[..., :2], labels[..., :2])
    high = torch.minimum(logits[..., 2:], labels[..., 2:])
    area = (high - low).clamp(min=0).prod(-1)
    whole = (logits[..., 2:] - logits[..., :2]).prod(-1) + (labels[..., 2:] - labels[..., :2]).prod(-1) - area
    return area / (whole + 1e-6)


def varifocal(logits, labels):
    target = F.one_hot(labels, 4).float()
    weight = 0.75 * logits.sigmoid().detach().pow(2) * (1 - target) + target
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight)


LABELS, BOXES = torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(6, 4)
LOSSES = {
    "cross entropy": (F.cross_entropy, LABELS),
    "for each sample": (lambda y, t: F.cross_entropy(y, t, reduction="none") * 2 + y.mean(1), LABELS),
    "a map": (lambda y, t: (y - F.one_hot(t, 4)).pow(2) + y.mean(), LABELS),
    "boxes": (lambda y, t: (1 - iou(y, t)).mean() + (y - t).abs().mean(), BOXES),
    "boxes for each sample": (lambda y, t: 1 - iou(y, t) + (y - t).abs().mean(-1), BOXES),
    "weighted": (varifocal, LABELS),
    "contrast": (lambda y, t: F.cross_entropy(F.normalize(y) @ F.normalize(y).t() / 0.1, t), LABELS),
    "penalty alone": (lambda y, t: y.pow(2).mean() + (y * y).sum(), LABELS),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_not_quantized(kind):
    torch.manual_seed(0)
    function, labels = LOSSES[kind]
    model, x = WithLoss(function), torch.randn(6, 8)
    assert places(plan(model, x, labels)) == places(plan(model, x)) and len(places(plan(model, x))) == 2
    _, model = compressed(model, [{"x": x, "labels": labels}])
    found = model(x=x, labels=labels)
    torch.testing.assert_close(found["loss"], function(found["logits"], labels))
    found["loss"].sum().backward()
    gradient = dict(model.named_parameters())["body.weight"].grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_model_that_returns_its_loss_alone():
    """Layers are quantized although they lead only to a loss, with what is between them."""
    model = Block(lambda m, x, t: F.cross_entropy((m.b(m.relu(m.a(x)) + x) * 2 + m.c(x)).mean((2, 3)), t))
    found = places(plan(model, torch.ones(2, 4, 8, 8), torch.tensor([0, 1])))
    assert found == [["model: input 0"], ["relu: output"], ["model: torch.Tensor.add#0 output"]]


def test_labels_that_the_network_reads_are_inputs():
    """A decoder reads the labels, shifted by one."""

    def forward(m, tokens, labels):
        h = m.embedding(tokens).mean(1, keepdim=True) + m.embedding(labels.roll(1, 1))
        logits = m.out(m.mix(h) * h)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    model = Block(forward)
    model.embedding, model.mix, model.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
    found = flat(plan(model, torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)))
    assert "mix: output" in found and "model: torch.Tensor.mul#0 output" in found


def test_outputs_without_dimensions_are_no_outputs_to_quantize():
    model = WithLoss(F.cross_entropy)
    found = flat(plan(model, torch.randn(6, 8), LABELS, quantize_outputs=True))
    assert found == ["model: input 0", "model: torch.nn.functional.relu#0 output", "head: output"]


def test_a_second_input_that_is_added_at_the_end_is_an_activation():
    """Images that a network corrects: no label, because the result has their shape."""
    model = Block(lambda m, x, image: m.b(m.relu(m.a(x))) + image)
    found = flat(plan(model, torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)))
    assert found == ["model: input 0", "model: input 1", "relu: output", "b: output"]


def test_counts_do_not_change_where_a_tail_is_no_loss():
    model = Block(lambda m, x: m.b(m.relu(m.a(x))) * 2 + m.c(x))
    assert counts(plan(model, torch.ones(2, 4, 8, 8)))[1] == 4
