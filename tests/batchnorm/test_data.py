"""Batch-norm adaptation: samples, batches, loaders."""

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    DataError,
    Plan,
    create_compressed_model,
    hookimpl,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from tests.bn_helpers import OneNorm, config, data, population_moments
from tests.plugin_helpers import algorithm, contributing
from tests.zoo import images, trained


@pytest.mark.parametrize(
    ("requested", "batch", "batches", "used"),
    [
        (32, 8, 20, 32),
        (36, 8, 20, 40),
        (35, 8, 20, 32),
        (1, 8, 20, 8),
        (1000, 8, 4, 32),
        (5, 1, 20, 5),
        (12, 8, 20, 16),
    ],
)
def test_samples_are_rounded_to_whole_batches(requested, batch, batches, used):
    fetched = []

    def loader():
        for item in data(batch * batches, batch):
            fetched.append(len(item))
            yield item

    controller, _ = create_compressed_model(OneNorm(), config(requested), init_loader=loader())
    assert controller.statistics().batchnorm_adaptation.report.samples == used
    assert used <= sum(fetched) <= used + batch
    assert requested != used or sum(fetched) == used  # nothing is fetched once the number is reached


def test_uneven_batches_are_normal():
    whole = torch.cat(data(32))
    uneven = [whole[:7], whole[7:8], whole[8:30], whole[30:]]  # the last is smaller, as a DataLoader's
    results = []
    for batches in ([whole], uneven):
        torch.manual_seed(1)
        model = OneNorm()
        create_compressed_model(model, config(32, "exact"), init_loader=batches)
        results.append(model.norm.running_var.double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OneNorm()

    def forward(self, pixels, scale=1.0):
        return self.inner(pixels * scale)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OneNorm()

    def forward(self, left, right):
        return self.inner(left + right)


class NNCFLoader(list):
    def get_inputs(self, item):
        return (item["image"],), {}


X = torch.cat(data(16))


@pytest.mark.parametrize(
    ("make", "loader", "forward_fn"),
    [
        (OneNorm, [X[:8], X[8:]], None),
        (OneNorm, [(X, torch.zeros(16))], None),
        (OneNorm, [[X, torch.zeros(16)]], None),
        (OneNorm, [(X,)], None),
        (OneNorm, [((X,), torch.zeros(16))], None),
        (Dicts, [{"pixels": X, "labels": torch.zeros(16)}], None),
        (Dicts, [({"pixels": X}, torch.zeros(16))], None),
        (TwoInputs, [(X, torch.zeros_like(X))], None),
        (TwoInputs, [(X, torch.zeros_like(X), torch.zeros(16))], None),
        (TwoInputs, [((X, torch.zeros_like(X)), torch.zeros(16))], None),
        (OneNorm, NNCFLoader([{"image": X}]), None),
        (TwoInputs, [{"a": X}], lambda model, batch: model(batch["a"], 0.0)),
    ],
    ids=[
        "tensors",
        "pairs",
        "lists",
        "tuples of one",
        "nested pairs",
        "dicts",
        "pairs of dicts",
        "two inputs",
        "triples",
        "nested inputs",
        "get_inputs",
        "forward_fn",
    ],
)
def test_forms_of_batches(make, loader, forward_fn):
    torch.manual_seed(1)
    model = make()
    document = register_default_init_args(config(16, "exact"), loader, forward_fn=forward_fn)
    create_compressed_model(model, document)
    inner = model if make is OneNorm else model.inner
    mean, var = population_moments(inner, [X])
    np.testing.assert_allclose(inner.norm.running_var, var, rtol=1e-6)
    np.testing.assert_allclose(inner.norm.running_mean, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("given", ["init_loader", "registered"])
@pytest.mark.parametrize("in_place", [True, False])
def test_shuffled_loader_is_as_before(registry, own_generator, given, in_place):
    """The training that follows draws the numbers that it would have drawn without adaptation."""
    if in_place:
        registry.register(contributing(scaling_in_place()), "demo")
    generator = torch.Generator().manual_seed(3) if own_generator else None
    dataset = torch.utils.data.TensorDataset(torch.cat(data(32)))
    loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True, generator=generator)
    document = config()
    if in_place:
        document["compression"] = {"algorithm": "mine", "initializer": document["compression"]["initializer"]}
    model = OneNorm()
    before = (torch.get_rng_state(), generator and generator.get_state())
    if given == "registered":
        create_compressed_model(model, register_default_init_args(document, loader))
    else:
        create_compressed_model(model, document, init_loader=loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert generator is None or torch.equal(generator.get_state(), before[1])


def scaling_in_place():
    def commit(self, model):
        with torch.no_grad():
            model.conv.weight.mul_(0.5)

    return algorithm(
        changes_in_place=True,
        compress_plan=hookimpl(lambda self: Plan(("conv.weight",))),
        compress_commit=hookimpl(commit),
    )


@pytest.mark.parametrize("method", ["paired", "exact"])
def test_non_finite_data_is_an_error_and_undone(method):
    batches = data(32, 8)
    batches[2][0, 0, 0, 0] = float("nan")
    model = trained(OneNorm(), (images(),))
    before = fingerprint(model)
    with pytest.raises(DataError, match="batch norm 'norm' hold NaN or infinity"):
        create_compressed_model(model, config(method=method), init_loader=batches)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "gave no sample"),
        (5, "iterable of batches, such as a DataLoader, got int"),
        (["text"], "holds no tensor"),
        ([{1, 2}], "holds no tensor"),
    ],
)
def test_unusable_loaders(loader, message):
    with pytest.raises(DataError, match=message) as caught:
        create_compressed_model(OneNorm(), config(), init_loader=loader)
    assert "compression.magnitude_sparsity.initializer.batchnorm_adaptation" in str(caught.value)


class Quotient(nn.Module):
    """Divides by numbers that 8 bits round to zero."""

    def __init__(self):
        super().__init__()
        self.numerator, self.denominator = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        small = (10 * self.denominator(x)).exp()
        return self.norm(self.numerator(x) / small)


def test_numbers_that_compression_made_infinite_are_not_blamed_on_the_data():
    model = Quotient().eval()
    section = {"algorithm": "quantization", "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}}
    with pytest.raises(DataError, match=r"'norm' hold NaN or infinity .* in the compressed model.*a denominator"):
        create_compressed_model(model, {"compression": section}, init_loader=data(32, 8))
