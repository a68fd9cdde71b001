"""Normalizations that are written out are one operator, like those of torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model, register_default_init_args
from tests.placement_helpers import Block, places, plan


def centered(x):
    return x - x.mean(1, keepdim=True)


def sam(x):
    """LayerNorm2d of SAM and ConvNeXt."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6)


def grn(x):
    """Global response normalization of ConvNeXt V2."""
    size = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x * (size / (size.mean(1, keepdim=True) + 1e-6))


NORMS = {
    "RMS norm": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "RMS norm in Llama": lambda x: x.to(torch.float32) * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6).to(x.dtype),
    "divided": lambda x: x / (x.square().mean(1, keepdim=True).sqrt() + 1e-6),
    "ScaleNorm": lambda x: 3 * x / x.norm(dim=1, keepdim=True).clamp(min=1e-5),
    "unit sum": lambda x: x / x.abs().sum(1, keepdim=True),
    "layer norm": lambda x: centered(x) * torch.rsqrt(centered(x).pow(2).mean(1, keepdim=True) + 1e-6),
    "layer norm of the variance": lambda x: centered(x) / (x.var(1, keepdim=True) + 1e-6).sqrt(),
    "SAM": sam,
    "GRN": grn,
    "largest": lambda x: x / x.abs().amax(1, keepdim=True),
    "mean alone": centered,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", [False, True])
def test_nothing_stands_inside_a_normalization(kind, affine):
    def forward(m, x):
        y = NORMS[kind](m.relu(m.a(x)))
        return m.b(y * m.gamma[:, None, None] + m.beta.view(1, -1, 1, 1) if affine else y)

    model = Block(forward)
    model.gamma, model.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
    first, before, after = places(plan(model, torch.randn(2, 4, 6, 6)))
    assert (first, before) == (["model: input 0"], ["relu: output"])
    assert "Tensor.add" in after[0] or not affine


def test_statistics_that_go_elsewhere_are_activations():
    model = Block(lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True) * m.c(x)))
    assert ["model: torch.Tensor.mean#0 output"] in places(plan(model, torch.randn(2, 4, 6, 6)))


def test_gates_with_layers_are_no_normalizations():
    def forward(m, x):
        y = m.relu(m.a(x))
        return m.b(y * torch.sigmoid(m.c(y.mean((2, 3), keepdim=True))))

    found = [place for group in places(plan(Block(forward), torch.randn(2, 4, 6, 6))) for place in group]
    assert "model: torch.Tensor.mean#0 output" in found and "model: torch.sigmoid#0 output" in found


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_an_rms_norm_by_hand_is_as_accurate_as_that_of_torch(scale):
    """Samples whose sizes differ by a factor of 300, as tokens do."""
    torch.manual_seed(0)
    x = torch.randn(64, 16) * torch.logspace(-1.2, 1.2, 64)[:, None] * scale
    first, last = nn.Linear(16, 16), nn.Linear(16, 4)

    def network(norm):
        return nn.Sequential(copy.deepcopy(first), Block(lambda m, y: norm(y)), copy.deepcopy(last))

    functions = (
        lambda y: F.rms_norm(y, (16,), eps=1e-6),
        lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
    )
    section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 64, "type": "min_max"}}}
    results = []
    for function in functions:
        config = register_default_init_args({"compression": section}, [(x, 0)])
        results.append(create_compressed_model(network(function), config)[1].eval()(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
