"""The estimators of batch-norm adaptation, against closed forms and float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    create_compressed_model,
)
from tests.bn_helpers import OneNorm, config, data, norms, population_moments
from tests.zoo import MobileNet, ResidualNet, images, trained


@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_exact_leaves_the_population_moments_of_the_compressed_model(batch):
    model = trained(OneNorm(), (images(),))
    batches = data(32, batch)
    create_compressed_model(model, config(method="exact"), init_loader=batches)
    mean, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-6, atol=1e-6 * np.sqrt(var).max())
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)


def test_paired_follows_its_formula():
    model = trained(OneNorm(), (images(),))
    old_mean, old_var = model.norm.running_mean.double().numpy().copy(), model.norm.running_var.double().numpy().copy()
    batches = list(torch.cat(data(28))[:, :, :5, :4].split(7))  # 3 x 2 positions after the convolution: all are paired
    original = copy.deepcopy(model)
    create_compressed_model(model, config(), init_loader=batches)
    with torch.no_grad():
        x = torch.cat(batches).double()
        seen = [copy.deepcopy(m).double().conv(x).movedim(1, 0).flatten(1).numpy() for m in (original, model)]
    (mean_o, var_o), (mean_c, var_c) = ((s.mean(1), s.var(1)) for s in seen)
    rho = np.array([np.corrcoef(o, c)[0, 1] for o, c in zip(*seen, strict=True)])
    assert rho.min() < 0.99  # the correlation matters here
    ratio = (var_c + model.norm.eps) / (var_o + model.norm.eps)
    expected_mean = mean_c + rho * (old_mean - mean_o) * np.sqrt(ratio)
    expected_var = var_c + rho**2 * (old_var * ratio - var_c)
    np.testing.assert_allclose(model.norm.running_var, expected_var, rtol=1e-5)
    np.testing.assert_allclose(model.norm.running_mean, expected_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["paired", "exact"])
@pytest.mark.parametrize("batch", [1, 8, 13])
def test_one_batch_norm_does_not_depend_on_the_split(method, batch):
    start, whole = trained(OneNorm(), (images(),)), torch.cat(data(48))
    results = []
    for batches in ([whole], list(whole.split(batch))):
        model = copy.deepcopy(start)
        create_compressed_model(model, config(48, method), init_loader=batches)
        results.append(model.norm)
    torch.testing.assert_close(results[0].running_var, results[1].running_var, rtol=1e-6, atol=0)
    scale = float(results[0].running_var.sqrt().max())
    torch.testing.assert_close(results[0].running_mean, results[1].running_mean, rtol=1e-6, atol=1e-6 * scale)


def test_momentum_is_what_batch_norm_does_in_training_mode():
    model = MobileNet()
    model.features[1].momentum = None  # the cumulative average
    trained(model, (images(),))
    reference = copy.deepcopy(model).eval()
    batches = data(32, 8)
    controller, _ = create_compressed_model(model, config(level=0.0, method="momentum"), init_loader=batches)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    for ours, theirs in zip(norms(model), norms(reference), strict=True):
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    assert controller.statistics().batchnorm_adaptation.report.method == "momentum"


@pytest.mark.parametrize("make", [ResidualNet, MobileNet])
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_paired_changes_nothing_where_compression_changed_nothing(make, batch):
    model = trained(make(), (images(),))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    create_compressed_model(model, config(level=0.0), init_loader=data(32, batch))
    for key, value in before.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm(6), type("Mine", (nn.BatchNorm2d,), {})(6)], ids=["sync", "subclass"]
)
def test_other_kinds_of_batch_norm(norm):
    model = OneNorm(norm)
    batches = data()
    create_compressed_model(model, config(method="exact"), init_loader=batches)
    _, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)


class OneDimensional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.conv, self.norm3 = nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)

    def forward(self, x):
        x = self.norm(self.fc(x))
        return self.norm3(self.conv(x.view(-1, 1, 1, 2, 2)))


@pytest.mark.parametrize("method", ["paired", "exact", "momentum"])
def test_batches_of_one_sample_with_one_position_are_legal(method):
    model = OneDimensional()
    with torch.no_grad():
        model.norm.running_mean.add_(0.1)
    create_compressed_model(model, config(16, method), init_loader=list(torch.randn(16, 1, 3)))
    assert all(norm.running_var.isfinite().all() and (norm.running_var >= 0).all() for norm in norms(model))


def test_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.norm(x + 5)
            return self.norm(self.fc(x))

    model, x = Twice(), torch.randn(64, 3)
    create_compressed_model(model, config(64, "exact"), init_loader=[x[:16], x[16:]])
    with torch.no_grad():
        seen = torch.cat([x + 5, model.fc(x)]).double()
    torch.testing.assert_close(model.norm.running_var.double(), seen.var(0, correction=0), rtol=1e-6, atol=0)


def test_never_trained_layer_gets_exact_moments_and_counts_its_batches():
    model, batches = OneNorm(), data(32, 8)
    create_compressed_model(model, config(), init_loader=batches)
    _, var = population_moments(model, batches)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)
    assert model.norm.num_batches_tracked == 4


def test_old_checkpoint_without_counter_is_not_taken_for_untrained():
    model = trained(OneNorm(), (images(),))
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    old = OneNorm()
    metadata = {name: {"version": 1} for name, _ in old.named_modules()}
    state = type(model.state_dict())(state)
    state._metadata = metadata
    old.load_state_dict(state)
    assert old.norm.num_batches_tracked == 0
    before = old.norm.running_var.clone()
    create_compressed_model(old, config(level=0.0), init_loader=data())
    torch.testing.assert_close(old.norm.running_var, before, rtol=1e-6, atol=0)


def test_calls_that_only_the_uncompressed_model_makes_are_not_paired_with_the_next_batch():
    class Dense(OneNorm):
        def forward(self, x):
            out = super().forward(x)
            if bool((self.conv.weight != 0).all()):
                self.norm(self.conv(x) * 5 + 3)
            return out

    start = trained(OneNorm(), (images(),))
    results = []
    for make in (OneNorm, Dense):
        model = make()
        model.load_state_dict(start.state_dict())
        create_compressed_model(model, config(32), init_loader=data(32, 8))
        results.append(model.norm)
    torch.testing.assert_close(results[1].running_var, results[0].running_var, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1].running_mean, results[0].running_mean, rtol=1e-5, atol=1e-6)
