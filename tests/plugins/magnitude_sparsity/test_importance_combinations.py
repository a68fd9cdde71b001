"""Importances that need data with other algorithms, other layers and other dtypes."""

import copy
import itertools

import pytest
import torch
from torch import nn

from compress_core import (
    create_compressed_model,
)
from tests.plugins.magnitude_sparsity.importance_helpers import (
    DATA_KINDS,
    batches,
    create,
    document,
    masks,
    net,
    run_epochs,
    size,
    zeros,
)
from tests.zoo import ResidualNet, images, trained


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_factors_shrink_with_the_weight_and_levels_go_on(kind):
    model = trained(ResidualNet(), (images(),))
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"pruning_target": 0.5, "prune_first_conv": True, "multiple_of": 1},
    }
    config = {"compression": [pruning, document(level=0.3, kind=kind)["compression"], {"algorithm": "quantization"}]}
    controller, _ = create_compressed_model(model, config, init_loader=[images() for _ in range(4)])
    before = zeros(masks(model, controller))
    with torch.no_grad():
        expected = model.eval()(images())
        controller.shrink()
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert zeros(masks(model, controller)) < before
    controller.set_sparsity_level(0.8)
    found = masks(model, controller)
    assert zeros(found) == round(0.8 * size(found))


class Attention(nn.Module):
    """Projections of attention, a layer that is called twice, a product of its own, and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.own = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.depthwise(self.twice(self.twice(x).relu()))
        return x @ self.own[:6]


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("kind", DATA_KINDS)
def test_attention_layers_called_twice_and_own_weights(kind, mode):
    model = Attention()
    data = list(torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0)).split(16))
    controller = create(model, data=data, kind=kind, mode=mode, level=0.4)
    found = masks(model, controller)
    assert {"attention.in_proj_weight", "twice.weight", "depthwise.weight"} <= found.keys()
    wanted = round(0.4 * size(found)) if mode == "global" else sum(round(0.4 * m.numel()) for m in found.values())
    assert zeros(found) == wanted
    controller.set_sparsity_level(0.7)
    assert controller.sparsity_level == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", DATA_KINDS)
def test_other_dtypes(kind, dtype):
    model = net(12, 9, 7).to(dtype)
    controller = create(model, data=[batch.to(dtype) for batch in batches()], kind=kind, level=0.4)
    for level in (0.4, 0.7, 0.2):
        controller.set_sparsity_level(level)
        found = masks(model, controller)
        assert zeros(found) == round(level * size(found))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_inputs_that_are_always_zero_and_constant_weights(kind):
    model, data = net(12, 9, 7), [batch * (torch.arange(12) > 3) for batch in batches()]
    nn.init.zeros_(model[1].weight)
    controller = create(model, data=data, kind=kind, level=0.2)
    found = masks(model, controller)
    assert zeros(found) == round(0.2 * size(found))
    controller.set_sparsity_level(0.6)
    assert zeros(masks(model, controller)) == round(0.6 * size(found))


def test_per_step_updates_remove_and_never_swap():
    model, data = net(12, 9, 7), batches()
    options = {"sparsity_target_epoch": 3, "update_per_optimizer_step": True, "steps_per_epoch": 2}
    controller, seen = create(model, data=data, level=0.1, **options), []
    run_epochs(controller, model, data, 4, seen)
    for before, after in itertools.pairwise(seen):
        assert all(bool((after[name] <= before[name]).all()) for name in after)
    assert zeros(seen[-1]) == round(0.9 * size(seen[-1]))


def trained_on_blobs():
    """A small network and images that it tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (1024,), generator=generator)
    patterns = torch.randn(8, 3, 8, 8, generator=generator)
    x = patterns[labels] + 1.2 * torch.randn(1024, 3, 8, 8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(4):
            for batch, target in zip(x[:768].split(64), labels[:768].split(64), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch), target).backward()
                optimizer.step()
    return model.eval(), x, labels


def test_reconstruction_in_steps_keeps_accuracy_that_magnitude_loses():
    plain, x, labels = trained_on_blobs()
    repair = {
        "weight_reconstruction": {"num_samples": 256},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 256},
    }
    found = {}
    for kind in ("normed_abs", "reconstruction"):
        model = copy.deepcopy(plain)
        create(model, data=list(x[:256].split(64)), kind=kind, level=0.95, sparsity_target=0.95, initializer=repair)
        with torch.no_grad():
            found[kind] = float((model.eval()(x[768:]).argmax(1) == labels[768:]).float().mean())
    with torch.no_grad():
        dense = float((plain(x[768:]).argmax(1) == labels[768:]).float().mean())
    assert dense > 0.9
    assert found["reconstruction"] > found["normed_abs"] + 0.05, found
