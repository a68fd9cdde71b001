"""The contract by the conformance kit, factors against the best approximation that there is."""

import json
import unittest

import pytest
import torch
from compress_lowrank import energy_rank, factorized
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.testing import Case, conformance_checks

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
BUILT_IN = [
    {"algorithm": "filter_pruning", "pruning_init": 0.25, "params": {"prune_first_conv": True, "multiple_of": 1}},
    {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3},
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}},
]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))


def convnet():
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 3, bias=False), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Conv2d(24, 20, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4)
    )


def section(**values):
    return {"algorithm": "lowrank", **values}


# A replaced layer is two layers, with names of their own, and stays so when the model is stripped.
REPLACED = dict.fromkeys(
    (
        "check_keeps_identity",
        "check_changes_what_it_plans",
        "check_state_dict_names",
        "check_strip_leaves_nothing",
        "check_strips_in_place",
    ),
    "layers are replaced by two, which have names of their own",
)


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract(check):
    case = Case(mlp, (X,), {"compression": section(rank=4)}, expected_failures=REPLACED)
    if check.__name__ == "check_loads_plain_state_dict":
        with pytest.raises(unittest.SkipTest, match="the plain model has other parameters"):
            check(case)
    else:
        check(case)


def test_error_is_that_of_the_singular_values_left_out():
    layer = nn.Linear(20, 30).double()
    pair = factorized(layer, 7)
    singular = torch.linalg.svdvals(layer.weight.detach())
    error = torch.linalg.matrix_norm(layer.weight - pair[1].weight @ pair[0].weight)
    assert float(error.detach()) == pytest.approx(float(singular[7:].square().sum().sqrt()), rel=1e-12)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_a_layer_of_full_rank_computes_the_same(padding_mode):
    layer = nn.Conv2d(16, 8, 1, stride=2, padding=1, padding_mode=padding_mode)
    torch.testing.assert_close(factorized(layer, 8)(IMAGES), layer(IMAGES), rtol=1e-5, atol=1e-5)


def test_rank_by_energy():
    weight = torch.diag(torch.tensor([3.0, 4.0, 0.0, 12.0]))  # squares 144, 16, 9 of 169
    assert [energy_rank(weight, energy) for energy in (144 / 169, 145 / 169, 161 / 169, 1.0)] == [1, 2, 3, 3]


def test_names_of_what_is_replaced_and_of_what_is_not():
    controller, model = create_compressed_model(convnet(), {"compression": section(rank=5)})
    assert list(model.state_dict()) == [
        *("0.0.weight", "0.1.weight", "0.1.bias", "2.weight", "4.0.weight", "4.1.weight", "4.1.bias"),
        *("7.weight", "7.bias"),
    ]
    skipped = controller.get_compression_state()["algorithms"]["lowrank"]["plan"]["skipped"]
    assert skipped["2.weight"] == "is no weight of an nn.Linear or a 1x1 nn.Conv2d"
    assert skipped["7.weight"] == "had too large a rank to gain by it"
    assert controller.compression_rate == pytest.approx(1 - (5 * 48 + 5 * 44) / (16 * 32 + 24 * 20))
    assert [type(module) for module in controller.strip()][:2] == [nn.Sequential, nn.ReLU]


def test_a_module_in_two_places_stays_one():
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    create_compressed_model(model, {"compression": section(rank=2)})
    assert isinstance(model[0], nn.Sequential)
    assert model[2] is model[0]


def test_what_reads_a_weight_itself_is_left():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ConfigError, match="finds nothing to compress"):
        create_compressed_model(model, {"compression": section(rank=2)})


def test_ranks_are_resumed_without_looking_at_weights():
    config = {"compression": section(energy=0.6)}
    controller, model = create_compressed_model(mlp(), config)
    state = json.loads(json.dumps(controller.get_compression_state()))
    other = mlp()
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.1)  # of rank 1
    resumed_controller, resumed = create_compressed_model(other, config, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(X), model(X))
    assert resumed_controller.get_compression_state() == state


def test_built_in_algorithms_plan_on_the_new_modules():
    config = {"input_info": {"sample_size": [4, 16, 8, 8]}, "compression": [section(rank=6), *BUILT_IN]}
    loader = [IMAGES, IMAGES * 0.5]
    controller, model = create_compressed_model(convnet(), config, init_loader=loader)
    assert list(controller.algorithms) == ["lowrank", "filter_pruning", "magnitude_sparsity", "quantization"]
    plans = {name: entry["plan"] for name, entry in controller.get_compression_state()["algorithms"].items()}
    assert "0.1.weight" in plans["magnitude_sparsity"]["targets"]
    assert {"0.0.weight", "0.1.weight"} <= set(plans["filter_pruning"]["targets"])
    expected = model.eval()(IMAGES).detach()
    plain = controller.strip()
    assert plain[0][1].weight.shape[0] == 24
    assert float((plain.eval()(IMAGES).detach() - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    state = json.loads(json.dumps(controller.get_compression_state()))
    _, resumed = create_compressed_model(convnet(), config, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(IMAGES), expected)
