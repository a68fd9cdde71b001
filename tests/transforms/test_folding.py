"""Computed weights become plain ones: the model computes the same, and can be compressed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from compress_core import CompressionError, ModelError, create_compressed_model, fold_computed_weights


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Broken(nn.Module):
    """Fails, so that it cannot be removed."""

    def forward(self, weight):
        raise RuntimeError("broken")


def old(function):
    def apply(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(layer)

    return apply


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "prune twice": lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.2), "weight", 0.5),
}
LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "conv": lambda: nn.Conv2d(6, 4, 3),
    "transposed": lambda: nn.ConvTranspose1d(6, 4, 3),
}
INPUTS = {"linear": (3, 6), "conv": (3, 6, 5, 5), "transposed": (3, 6, 5)}
SECTIONS = [
    {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 3}}},
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_folded_models_compute_the_same_and_can_be_compressed(kind, layer):
    def make():
        torch.manual_seed(0)
        found = nn.Sequential(LAYERS[layer]())
        KINDS[kind](found[0])
        return found

    model = make()
    x = torch.rand(INPUTS[layer])
    expected = model.eval()(x)
    for section in SECTIONS:
        with pytest.raises(CompressionError, match=r"fold_computed_weights\(model\)"):
            create_compressed_model(make(), {"compression": section}, init_loader=[x])
    assert fold_computed_weights(model.train()) == ["0.weight"]
    assert model.training and model[0].training
    assert torch.allclose(model.eval()(x), expected, rtol=1e-6, atol=1e-7)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias"}
    assert not list(model.buffers())
    assert fold_computed_weights(model) == []
    for section in SECTIONS:
        create_compressed_model(copy.deepcopy(model), {"compression": section}, init_loader=[x])


def test_what_cannot_be_folded_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[1], "weight", Broken(), unsafe=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="cannot be removed"):
        fold_computed_weights(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert parametrize.is_parametrized(model[0], "weight")


def test_compressed_models_are_refused():
    _, model = create_compressed_model(nn.Linear(4, 4), {"compression": SECTIONS[0]})
    with pytest.raises(ModelError, match="before that"):
        fold_computed_weights(model)
