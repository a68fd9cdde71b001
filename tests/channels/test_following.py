"""Tensors of weight transforms follow their weight when channels go, as they declare, or are refused by name."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_core.channels import channel_groups, input_specs, shrink_model
from compress_core.trace import trace
from compress_core.transforms import (
    WeightTransform,
)
from tests.channels.following_helpers import (
    Codebook,
    DerivedUndeclared,
    Undeclared,
    X,
    add,
    check_refused,
    check_strip_and_shrink,
    evaluated,
    pruned,
    zero,
)


def test_a_codebook_as_long_as_the_weight_has_inputs_stays_whole():
    controller, model = pruned()
    transform = add(model, Codebook())
    entries = transform.entries.detach().clone()
    check_strip_and_shrink(controller, model)
    assert torch.equal(transform.entries, entries)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (Undeclared, "derive the class from compress_core.transforms.WeightTransform and declare follows"),
        (DerivedUndeclared, "removed; declare follows"),
    ],
)
def test_a_tensor_that_is_not_declared_is_refused_by_name(make, remedy):
    controller, model = pruned()
    add(model, make())
    check_refused(
        controller, model, rf"'mine' \({make.__name__}\) of '2.weight' .*'entries', of shape \(15,\).*{remedy}"
    )


def test_a_nested_tensor_is_declared_by_its_dotted_name():
    class Nested(WeightTransform):
        def __init__(self):
            super().__init__()
            self.inside = Codebook()

        def forward(self, weight):
            return self.inside(weight)

    controller, model = pruned()
    add(model, Nested())
    check_refused(controller, model, "'inside.entries'")
    Nested.follows = {"inside.entries": "fixed"}
    check_strip_and_shrink(controller, model)


def test_a_tensor_that_is_no_buffer_cannot_follow():
    class Hidden(WeightTransform):
        def __init__(self):
            super().__init__()
            self.factor = torch.ones(4, 15)

        def forward(self, weight):
            return weight * self.factor

    controller, model = pruned()
    add(model, Hidden())
    check_refused(controller, model, r"'factor', of shape \(4, 15\)")
    Hidden.follows = {"factor": "weight"}
    check_refused(controller, model, "'factor' as a plain attribute.*register_buffer")


def test_one_element_has_nothing_to_lose():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([[2.0]]))

        def forward(self, weight):
            return weight * self.factor

    controller, model = pruned()
    add(model, Scaled())
    check_strip_and_shrink(controller, model)


class Factor(WeightTransform):
    """Multiplies by a tensor of random numbers."""

    def __init__(self, *shape, view=None):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(shape))
        self.view = view

    def forward(self, weight):
        return weight * (self.factor if self.view is None else self.factor.view(self.view))


class ByWeight(Factor):
    follows: ClassVar = {"factor": "weight"}


class ByChannel(Factor):
    follows: ClassVar = {"factor": "channels"}


@pytest.mark.parametrize(
    ("name", "transform", "left"),
    [
        ("2.weight", lambda: ByWeight(4, 15), (4, 9)),
        ("2.weight", lambda: ByWeight(1, 15), (1, 9)),
        ("2.weight", lambda: ByWeight(15), (9,)),
        ("2.weight", lambda: ByWeight(4, 1), (4, 1)),
        ("0.weight", lambda: ByWeight(15, 6), (9, 6)),
        ("0.weight", lambda: ByChannel(15, view=(-1, 1)), (9,)),
        ("0.weight", lambda: ByChannel(15, 1), (9, 1)),
        ("0.bias", lambda: ByChannel(15), (9,)),
        ("2.weight", lambda: ByChannel(4, 1), (4, 1)),
    ],
)
def test_words(name, transform, left):
    controller, model = pruned()
    transform = add(model, transform(), name)
    values = transform.factor.detach().flatten().tolist()
    check_strip_and_shrink(controller, model)
    assert transform.factor.shape == left
    assert set(transform.factor.flatten().tolist()) <= set(values)


def test_output_channels_of_a_square_weight_are_not_its_inputs():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    controller, model = pruned(model=model)
    transform = add(model, ByChannel(6, view=(-1, 1)))
    factor, expected = transform.factor.detach().clone(), evaluated(model)
    controller.shrink()
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]
    assert kept["0"] != kept["1"]
    assert torch.equal(transform.factor, factor[kept["0"]])
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.ConvTranspose2d(6, 8, 2), 8),
        (nn.Conv2d(6, 8, 2), 8),
    ],
)
def test_output_channels_of_convolutions(layer, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    found = trace(model, (x,))
    pairs = [(group, {0, 2}) for group in channel_groups(found).prunable]
    assert len(pairs) == 2
    zero(model, pairs)
    view = (1, -1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    transform = add(model, ByChannel(size, view=view))
    factor, expected = transform.factor.detach().clone(), model(x)
    shrink_model(model, pairs, input_specs(found.forwards[0]))
    assert torch.equal(transform.factor, factor[[1, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (ByWeight(3, 5, view=(1, 15)), r"'factor', of shape \(3, 5\), follows as 'weight', but does not broadcast"),
        (ByChannel(15), r"'factor', of shape \(15,\), follows as 'channels', but the weight has 4 output channels"),
    ],
)
def test_declared_words_that_cannot_be_true(transform, message):
    controller, model = pruned()
    add(model, transform)
    check_refused(controller, model, message)


def test_an_unknown_word_is_refused():
    class Misspelt(Factor):
        follows: ClassVar = {"factor": "wieght"}

    controller, model = pruned()
    add(model, Misspelt(4, 15))
    check_refused(controller, model, "'wieght'; there are 'weight', 'channels', 'fixed'")


class Transposed(Factor):
    """Holds the weight's factors the other way round, which no word says."""

    def forward(self, weight):
        return weight * self.factor.T

    def shrunk_dims(self, name, tensor, shape, kept):
        return {1 - dim: indices for dim, indices in kept.items()} if name == "factor" else None


def test_what_words_cannot_say():
    controller, model = pruned()
    transform = add(model, Transposed(15, 4))
    check_strip_and_shrink(controller, model)
    assert transform.factor.shape == (9, 4)


@pytest.mark.parametrize("wrong", [{0: [99]}, {0: [3, 1]}, {5: [0]}, {0: []}])
def test_wrong_answers_are_refused(wrong):
    class Wrong(Transposed):
        def shrunk_dims(self, name, tensor, shape, kept):
            return wrong

    controller, model = pruned()
    add(model, Wrong(15, 4))
    check_refused(controller, model, "says by shrunk_dims that of its tensor 'factor'")


def test_a_transform_of_two_weights_that_lose_other_channels():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    controller, model = pruned(model=model)
    transform = add(model, ByWeight(6, 6))
    add(model, transform, "0.weight")
    check_refused(controller, model, "shares its tensor 'factor' with another weight", module="2")


def test_a_codebook_of_two_weights():
    controller, model = pruned()
    transform = add(model, Codebook())
    add(model, transform, "0.weight")
    # Both layers are masked: what the codebook makes of zeros is zero, as 0 is one of its entries.
    check_strip_and_shrink(controller, model)
    assert len(transform.entries) == 15


def test_the_optimizer_and_the_average_follow():
    controller, model = pruned()
    transform = add(model, ByWeight(4, 15))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()(X).square().mean().backward()
    optimizer.step()
    ema = copy.deepcopy(model)
    expected = evaluated(ema)
    controller.shrink(optimizer, ema)
    assert optimizer.state[transform.factor]["momentum_buffer"].shape == (4, 9)
    torch.testing.assert_close(evaluated(ema), expected, rtol=0, atol=1e-6)
    model.train()(X).square().mean().backward()
    optimizer.step()
