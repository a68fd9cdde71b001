"""The formulas, against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress_core import ModelError
from compress_knowledge_distillation import losses
from compress_knowledge_distillation.distance import Distance
from tests.plugins.knowledge_distillation.helpers import Returning, create


def reference(kind, scale, temperature, student, teacher):
    """NNCF's formulas, element by element."""
    samples, classes = len(student), len(student[0])
    if kind == "mse":
        squares = [
            (t - s) ** 2 for row, other in zip(student, teacher, strict=True) for s, t in zip(row, other, strict=True)
        ]
        return scale * math.fsum(squares) / len(squares)
    terms = []
    for row, other in zip(student, teacher, strict=True):
        partition = math.log(math.fsum(math.exp(s / temperature) for s in row))
        whole = math.fsum(math.exp(t / temperature) for t in other)
        terms += [
            (s / temperature - partition) * math.exp(t / temperature) / whole for s, t in zip(row, other, strict=True)
        ]
    return scale * temperature**2 * classes * -math.fsum(terms) / (samples * classes)


@pytest.mark.parametrize(
    ("kind", "scale", "temperature"),
    [("mse", 1, None), ("softmax", 1, 1), ("mse", 10, None), ("softmax", 1, 5), ("softmax", 2, 5)],
)
def test_values_are_those_of_the_formulas(kind, scale, temperature):
    student, teacher = Returning((7,), seed=1), Returning((7,), seed=2)
    extra = {} if temperature is None else {"temperature": float(temperature)}
    controller, model = create(student, teacher=teacher, type=kind, scale=float(scale), **extra)
    x = 3 * torch.randn(6, 3, dtype=torch.float64)
    outputs = model(x)
    expected = reference(kind, scale, temperature, outputs.tolist(), teacher(x).tolist())
    assert controller.loss().dtype == torch.float64
    assert controller.loss().item() == pytest.approx(expected, abs=1e-5, rel=1e-12)
    assert controller.statistics().to_dict()["knowledge_distillation"]["loss"] == pytest.approx(expected, rel=1e-12)


def test_gradient_of_softmax_is_that_of_the_divergence():
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(losses.softmax(student, teacher, temperature=3.0, dim=1), student)
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    torch.testing.assert_close(found, 3 * (p - q).detach() / 4)


def test_softmax_of_maps_is_that_of_all_positions():
    student, teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    found = losses.softmax(student, teacher, temperature=2.0, dim=1)
    torch.testing.assert_close(found, losses.softmax(*flat, temperature=2.0, dim=1))
    assert found.item() == pytest.approx(reference("softmax", 1, 2.0, *(x.tolist() for x in flat)))


def test_cosine_is_that_of_the_channels_at_each_position():
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    cosines = []
    for sample in range(2):
        for position in range(3):
            a, b = student[sample, :, position], teacher[sample, :, position]
            cosines.append(1 - (a @ b / (a.norm() * b.norm())).item())
    assert losses.cosine(student, teacher, dim=1).item() == pytest.approx(sum(cosines) / 6)


def test_attention_is_that_of_the_authors_code():
    student, teacher = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 9, 5, 6, dtype=torch.float64)

    def at(x):  # github.com/szagoruyko/attention-transfer, utils.py
        return nn.functional.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    expected = (at(student) - at(teacher)).pow(2).mean()
    torch.testing.assert_close(losses.attention(student, teacher, dim=1), expected)
    channels_last = [x.permute(0, 2, 3, 1) for x in (student, teacher)]
    torch.testing.assert_close(losses.attention(*channels_last, dim=3), expected)


@given(st.floats(0.01, 100), st.integers(0, 10))
def test_attention_and_cosine_do_not_see_how_large_activations_are(factor, seed):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for loss in (losses.attention, losses.cosine):
        assert abs(loss(factor * x, x, dim=1).item()) < 1e-12


@given(st.sampled_from(["mse", "cosine", "attention"]), st.integers(0, 10))
def test_a_student_like_its_teacher_has_no_loss_and_any_other_has(kind, seed):
    x, y = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    distance = Distance(kind, 2.0, "key")
    assert abs(distance(x, x.clone(), "it").item()) < 1e-12
    assert distance(x, y, "it").item() > 1e-3


@pytest.mark.parametrize("kind", ["mse", "softmax", "cosine", "attention"])
def test_zeros_have_finite_gradients(kind):
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    Distance(kind, 1.0, "key")(x, torch.randn(2, 4, 3, 3), "it").backward()
    assert x.grad.isfinite().all()


def test_half_precision_is_compared_in_float32():
    x, y = torch.randn(2, 8, 40).to(torch.bfloat16)
    found = Distance("mse", 1.0, "key")(x, y, "it")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.float() - y.float()).square().mean())


@pytest.mark.parametrize(
    ("kind", "own", "other", "dim", "message"),
    [
        ("mse", (2, 5), (2, 6), None, r"the output has the shape \(2, 5\), and the teacher's \(2, 6\)"),
        ("mse", (2, 4, 3, 3), (2, 8, 3, 3), None, "or the type attention"),
        ("mse", (2, 1), (2, 5), None, "needs the same shape"),
        ("softmax", (2, 5, 6), (2, 5, 6), None, r"not clear with three. Set features.0.channel_dim: -1 for sequences"),
        ("cosine", (2, 5, 6), (2, 5, 6), None, "not clear with three"),
        ("attention", (2, 5, 6), (2, 5, 6), None, "not clear with three"),
        ("softmax", (5,), (5,), None, "dimension 1 of it cannot hold classes"),
        ("softmax", (2, 5), (2, 5), 0, r"\(0 holds the samples\)"),
        ("cosine", (5,), (5,), -1, r"\(0 holds the samples\)"),
        ("attention", (2, 5), (2, 5), None, "no positions to attend to"),
        ("attention", (2, 5, 3, 3), (2, 5, 4, 3), None, "needs the same positions"),
        ("attention", (2, 5, 3, 3), (2, 5, 9), None, "needs the same positions"),
    ],
)
def test_what_does_not_fit_is_refused(kind, own, other, dim, message):
    with pytest.raises(ModelError, match=message):
        Distance(kind, 1.0, "features.0.channel_dim", dim)(torch.randn(own), torch.randn(other), "the output")


def test_three_dimensions_are_compared_where_the_config_says():
    x, y = torch.randn(2, 2, 3, 5)
    found = Distance("softmax", 1.0, "class_dim", -1)(x, y, "it")
    torch.testing.assert_close(found, losses.softmax(x.reshape(-1, 5), y.reshape(-1, 5), temperature=1.0, dim=1))


def test_a_class_that_both_rule_out_counts_nothing():
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    masked = [torch.cat([x, torch.full((4, 2), -math.inf, dtype=x.dtype)], 1) for x in (student, teacher)]
    found = losses.softmax(*masked, temperature=2.0, dim=1)
    expected = losses.softmax(student, teacher, temperature=2.0, dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


def test_a_class_that_only_the_student_rules_out_is_an_infinite_loss():
    student = torch.tensor([[0.0, -math.inf]])
    assert losses.softmax(student, torch.zeros(1, 2), temperature=1.0, dim=1).item() == math.inf


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 3), (2, 5, 0, 3)])
@pytest.mark.parametrize("kind", ["mse", "softmax", "cosine", "attention"])
def test_a_batch_of_nothing_adds_nothing(kind, shape):
    """Such as the boxes of an image that shows nothing: a mean over none would be no number, and spoil the weights."""
    if kind == "attention" and len(shape) < 3:
        return
    student = torch.zeros(shape, requires_grad=True)
    found = Distance(kind, 2.0, "class_dim")(student, torch.zeros(shape), "output")
    assert found.item() == 0
    found.backward()
    assert student.grad.shape == shape
