"""Which parameters are weights, along which dimension their output channels run, and what stands in the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core.trace import trace
from compress_core.trace.weights import find_weights


class Computes(nn.Module):
    """A model with parameters of given shapes, and a function as forward."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def grouped(m, x):
    rows, ends = x.bfloat16().repeat(1, 1), torch.tensor([1, 2, 4], dtype=torch.int32)
    return torch._grouped_mm(rows, m.w.bfloat16().transpose(-2, -1), offs=ends)


def uses(function, **shapes):
    return find_weights(trace(Computes(function, **shapes), torch.randn(4, 8), training=True)).uses


@pytest.mark.parametrize(
    ("function", "shape", "channel_dim"),
    [
        (lambda m, x: x @ m.w, (8, 5), 1),
        (lambda m, x: torch.addmm(x.new_zeros(5), x, m.w), (8, 5), 1),
        (lambda m, x: F.linear(x, m.w), (5, 8), 0),
        (lambda m, x: x @ m.w.t(), (5, 8), 0),
        (lambda m, x: x @ m.w.T.contiguous().view(8, 5).to(x.dtype), (5, 8), 0),
        (lambda m, x: m.w @ x.T, (5, 8), 0),
        (lambda m, x: torch.einsum("bi,oi->bo", x, m.w), (5, 8), 0),
        (lambda m, x: torch.einsum("bi,hio->bho", x, m.w), (2, 8, 5), None),  # the heads and their channels
        (lambda m, x: torch.bmm(x.expand(3, 4, 8), m.w), (3, 8, 5), 2),
        (lambda m, x: torch.baddbmm(x.new_zeros(1, 1, 1), x.expand(3, 4, 8), m.w), (3, 8, 5), 2),
        (lambda m, x: F.linear(x, m.w[1]), (3, 5, 8), 1),
        (lambda m, x: torch.stack([F.linear(x, w) for w in m.w]), (3, 5, 8), 1),
        (lambda m, x: torch.stack([x @ w for w in m.w.chunk(3, 1)]), (8, 15), 1),
        (lambda m, x: F.conv1d(x[:, :, None], m.w), (5, 8, 1), 0),
        (lambda m, x: F.conv_transpose1d(x[:, :, None], m.w), (8, 5, 1), 1),
        (lambda m, x: F.conv2d(x.view(4, 2, 2, 2), m.w), (5, 2, 1, 1), 0),
        (lambda m, x: F.embedding(torch.arange(4), m.w) + x, (10, 8), 0),
        (lambda m, x: F.linear(x, 0.1 * m.w), (5, 8), 0),
        (grouped, (3, 16, 8), 1),  # fused experts
        (lambda m, x: F.linear(x, F.linear(x, m.w).relu() @ m.w), (8, 8), None),  # two layouts
        (lambda m, x: torch.einsum("ti,tio->to", x, m.w[x.argmax(1) % 3]), (3, 8, 5), 2),  # an expert for each row
        (lambda m, x: x @ m.w.unsqueeze(0).squeeze(0).reshape(8, 5), (8, 5), 1),
    ],
)
def test_output_channels_of_products(function, shape, channel_dim):
    (use,) = uses(function, w=shape).values()
    assert (use.name, use.channel_dim, use.obstacle) == ("w", channel_dim, "")


def test_weights_that_are_joined_keep_their_dimensions():
    found = uses(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=(3, 8), b=(2, 8))
    assert {(use.name, use.channel_dim, use.obstacle) for use in found.values()} == {("a", 0, ""), ("b", 0, "")}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.v * m.g),
        lambda m, x: F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)),
        lambda m, x: F.linear(x, torch._weight_norm(m.v, m.g, 0)),
    ],
)
def test_factors_of_a_weight_are_no_weights(function):
    (use,) = uses(function, v=(5, 8), g=(5, 1)).values()
    assert (use.name, use.channel_dim, use.obstacle) == ("v", 0, "")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.w,
        lambda m, x: x * m.w,
        lambda m, x: torch.cat([x, m.w]) @ x.T,  # a token
        lambda m, x: F.layer_norm(x, (4, 8), m.w),
        lambda m, x: (x + m.w[:4]) @ x.T,
    ],
)
def test_other_parameters_are_no_weights(function):
    assert not uses(function, w=(4, 8))


@pytest.mark.parametrize(
    ("function", "shapes", "why"),
    [
        (lambda m, x: F.linear(x, m.w - m.w.mean()), {"w": (5, 8)}, "computes a weight from it (sub)"),
        (lambda m, x: F.linear(x, m.w.sign()), {"w": (5, 8)}, "computes a weight from it (sign)"),
        (lambda m, x: F.linear(x, m.b @ m.a), {"a": (2, 8), "b": (5, 2)}, "computes a weight from it (mm)"),
    ],
)
def test_what_is_done_to_a_weight_stands_in_the_way(function, shapes, why):
    found = uses(function, **shapes)
    assert set(found) == set(shapes)
    assert all(why in use.obstacle for use in found.values())


def test_operators_that_may_be_products_stand_in_the_way():
    def attended(m, x):
        return torch.cdist(x, m.w)

    assert "it enters 'aten._cdist_forward" in uses(attended, w=(5, 8))["w"].obstacle


def test_a_forward_that_writes_to_its_weight_stands_in_the_way():
    def normalizing(m, x):
        with torch.no_grad():
            m.w.div_(m.w.norm())
        return F.linear(x, m.w)

    assert uses(normalizing, w=(5, 8))["w"].obstacle == "the forward writes to it"
