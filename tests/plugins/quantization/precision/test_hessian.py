"""Traces of Hessians against exact ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ModelError
from compress_quantization.precision.hessian import gauss_newton_traces, hessian_traces
from compress_quantization.precision.outputs import divergence


def quadratic(matrix, x):
    return lambda: 0.5 * x @ matrix @ x


def test_a_diagonal_hessian_is_exact_after_the_fewest_vectors():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    diagonal = torch.arange(1.0, 8, dtype=torch.float64)
    found = hessian_traces([x], [(quadratic(torch.diag(diagonal), x), 1.0)], iterations=50, tolerance=1e-6)
    assert found.values == pytest.approx([28.0], rel=1e-12)
    assert found.iterations == 10


def test_the_mean_starts_from_zero_and_comes_close_to_the_trace():
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix = root @ root.T
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    found = hessian_traces([x], [(quadratic(matrix, x), 1.0)], iterations=1000, tolerance=1e-9)
    # Var(v^T A v) = 2 * sum of squares off the diagonal for random signs.
    off = matrix - torch.diag(matrix.diagonal())
    standard_error = math.sqrt(2 * float(off.square().sum()) / 1000)
    assert abs(found.values[0] - float(matrix.trace())) < 4 * standard_error
    assert found.error == pytest.approx(standard_error / found.values[0], rel=0.2)
    assert found.iterations == 1000


def test_luck_does_not_end_the_iterations():
    # Each estimate is 0.2 or 3.8 with equal probability, so two in a row often agree: NNCF's test would end there.
    matrix = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for seed in range(10):
        found = hessian_traces([x], [(quadratic(matrix, x), 1.0)], iterations=300, tolerance=0.1, seed=seed)
        assert 40 < found.iterations < 300
        assert found.error < 0.1
        assert found.values[0] == pytest.approx(2.0, abs=4 * 0.1 * 2)


def test_batches_are_summed_with_their_shares():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = [(quadratic(k * torch.eye(3, dtype=torch.float64), x), share) for k, share in ((1.0, 0.25), (3.0, 0.75))]
    assert hessian_traces([x], losses, iterations=9, tolerance=1e-9).values == pytest.approx([7.5])


def test_the_global_generator_is_not_used():
    x = torch.zeros(3, requires_grad=True)
    before = torch.get_rng_state()
    hessian_traces([x], [(quadratic(torch.eye(3), x), 1.0)], iterations=9, tolerance=1e-9)
    assert torch.equal(before, torch.get_rng_state())


def exact_traces(loss_of, tensors):
    """The trace of each diagonal block, from the whole Hessian."""
    found = []
    for number, tensor in enumerate(tensors):

        def alone(value, number=number):
            return loss_of([value if i == number else t for i, t in enumerate(tensors)])

        hessian = torch.autograd.functional.hessian(alone, tensor)
        found.append(float(hessian.reshape(tensor.numel(), -1).trace()))
    return found


@pytest.mark.parametrize("kind", ["kl", "squared"])
def test_without_labels_the_trace_is_that_of_gauss_newton(kind):
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    first, second = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 3)))

    def output(weights):
        return torch.tanh(x @ weights[0].T) @ weights[1].T

    reference = output([first, second]).detach()

    def loss(weights):
        return divergence(kind, [reference], [output(weights)])

    expected = exact_traces(loss, [first.detach(), second.detach()])
    # The closed form: tr(J^T H J) with H the Hessian of the loss in the output, diag(p) - p p^T or the identity.
    for weight, number in ((first, 0), (second, 1)):

        def out(w, number=number):
            return output([w if number == 0 else first.detach(), w if number == 1 else second.detach()])

        jacobian = torch.autograd.functional.jacobian(out, weight.detach()).reshape(5, 4, -1)
        p = F.softmax(reference, 1)
        inner = (
            torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            if kind == "kl"
            else torch.eye(4).double().expand(5, 4, 4)
        )
        closed = torch.einsum("ncw,ncd,ndw->", jacobian, inner, jacobian)
        assert float(closed) == pytest.approx(expected[number], rel=1e-8)
    found = hessian_traces([first, second], [(lambda: loss([first, second]), 1.0)], iterations=1200, tolerance=1e-3)
    assert found.values == pytest.approx(expected, rel=0.08)
    outputs = [(lambda: [output([first, second])], 1.0)]
    found = gauss_newton_traces([first, second], outputs, kind, iterations=1200, tolerance=1e-3)
    assert found.values == pytest.approx(expected, rel=0.05)
    assert min(gauss_newton_traces([first, second], outputs, kind, iterations=1, tolerance=1e-3).values) > 0


def test_a_loss_without_second_derivatives_is_refused_with_the_remedy():
    class OnlyOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ModelError, match="'sensitivity' needs none"):
        hessian_traces([x], [(lambda: OnlyOnce.apply(x).square().sum(), 1.0)], iterations=5, tolerance=1e-3)


def test_a_weight_that_the_loss_does_not_depend_on_has_the_trace_zero():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    found = hessian_traces([x, y], [(lambda: x.square().sum(), 1.0)], iterations=6, tolerance=1e-3)
    assert found.values == pytest.approx([4.0, 0.0])
