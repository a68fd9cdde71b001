"""Masks of attention and of maxima: what holds numbers for infinity is not quantized."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from tests.placement_helpers import Block, places, plan


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
