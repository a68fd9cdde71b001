"""What tests of channels share."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from compress_core import Stage, create_compressed_model
from compress_core.channels import ShrinkError
from compress_core.testing.fingerprint import fingerprint
from compress_core.transforms import (
    WeightTransform,
    add_weight_transform,
    get_weight_transform,
    raw_parameter,
)


class Undeclared(nn.Module):
    """Maps each value to the nearest entry of a trained codebook; says nothing about itself."""

    def __init__(self):
        super().__init__()
        self.entries = nn.Parameter(torch.linspace(-0.3, 0.3, 15))

    def forward(self, weight):
        return self.entries[(weight.unsqueeze(-1) - self.entries).abs().argmin(-1)]


class DerivedUndeclared(Undeclared, WeightTransform):
    pass


class Codebook(DerivedUndeclared):
    follows: ClassVar = {"entries": "fixed"}


class TopK(WeightTransform):
    """Keeps the half of a weight whose learned scores are largest."""

    follows: ClassVar = {"scores": "weight"}

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.rand_like(weight))

    def mask(self):
        return self.scores >= self.scores.flatten().topk(self.scores.numel() // 2).values[-1]

    def forward(self, weight):
        return weight * self.mask()


class DependentTopK(TopK):
    depends_on_whole_tensor = True


class FreezingTopK(DependentTopK):
    follows: ClassVar = {"scores": "weight", "frozen": "weight"}

    def forward(self, weight):
        return weight * (self.mask() if self.depends_on_whole_tensor else self.frozen)

    def freeze_decision(self, weight):
        self.register_buffer("frozen", self.mask())
        self.depends_on_whole_tensor = False


class Clusters(WeightTransform):
    """Like k-means of one step: values above and below the mean become the mean of their kind. It holds no tensor."""

    def forward(self, weight):
        high = weight >= weight.mean()
        return torch.where(high, weight[high].mean(), weight[~high].mean())


class FreezingClusters(Clusters):
    depends_on_whole_tensor = True
    follows: ClassVar = {"high": "weight", "means": "fixed"}

    def forward(self, weight):
        if self.depends_on_whole_tensor:
            return super().forward(weight)
        return torch.where(self.high, self.means[1], self.means[0])

    def freeze_decision(self, weight):
        high = weight >= weight.mean()
        self.register_buffer("high", high)
        self.register_buffer("means", torch.stack([weight[~high].mean(), weight[high].mean()]))
        self.depends_on_whole_tensor = False


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 4))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


def pruned(*sections, model=None):
    section = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.4,
        "params": {"prune_first_conv": True, "multiple_of": 1},
    }
    config = {
        "input_info": {"sample_size": list(X.shape)},
        "target_device": "TRIAL",
        "compression": [section, *sections],
    }
    return create_compressed_model(mlp() if model is None else model, config, init_loader=[(X, torch.zeros(8))] * 2)


def add(model, transform, name="2.weight"):
    add_weight_transform(model, name, transform, stage=Stage.PRECISION, key="mine")
    if isinstance(transform, TopK):
        # The channels that go have the largest scores: without them others would be chosen.
        mask = getattr(get_weight_transform(model, name, "filter_pruning"), "mask", torch.ones(()))
        with torch.no_grad():
            transform.scores.add_(mask == 0)
    return transform


def evaluated(model):
    with torch.no_grad():
        return model.eval()(X)


def check_strip_and_shrink(controller, model, atol=1e-6):
    """Both leave outputs as they are, though tensors are smaller; returns the stripped model."""
    expected = evaluated(model)
    before = fingerprint(model)
    small = controller.strip()
    assert fingerprint(model) == before
    assert raw_parameter(small, "2.weight").shape == (4, 9)
    torch.testing.assert_close(evaluated(small), expected, rtol=0, atol=atol)
    controller.shrink()
    assert raw_parameter(model, "2.weight").shape == (4, 9)
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=atol)
    return small


def check_refused(controller, model, match, module="2"):
    """Neither is possible, and nothing has changed."""
    expected = evaluated(model)
    before = fingerprint(model)
    for remove in (controller.strip, lambda: controller.strip(do_copy=False), controller.shrink):
        with pytest.raises(ShrinkError, match=match) as caught:
            remove()
        assert caught.value.module == module
        assert fingerprint(model) == before
    assert torch.equal(evaluated(model), expected)


def zero(model, pairs):
    with torch.no_grad():
        for group, channels in pairs:
            for member in group.members:
                gone = [i for i, channel in enumerate(member.channels.tolist()) if channel in channels]
                tensor = dict(model.named_parameters())[member.parameter]
                tensor.index_fill_(member.dim, torch.tensor(gone), 0)
