"""The contract by the conformance kit, corrections against means that are worked out by hand."""

import pytest
import torch
from torch import nn

from compress_core import ConfigError, DataError, UsageError, create_compressed_model
from compress_core.testing import Case, conformance_checks

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5
LOADER = [(X[:8], torch.zeros(8)), (X[8:], torch.zeros(8))]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def config(level=0.5, samples=16):
    initializer = {"bias_correction": {"num_samples": samples}}
    return {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": level, "initializer": initializer}}


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract(check):
    # What it corrects belongs to no algorithm's plan.
    expected = {"check_changes_what_it_plans": "biases are corrected, which no algorithm plans"}
    check(Case(network, (X[:4],), config(), loader=LOADER, expected_failures=expected))


def test_a_linear_layer_is_corrected_by_the_lost_weights_times_the_mean_input():
    layer = nn.Linear(6, 4)
    torch.manual_seed(2)
    batch = torch.randn(32, 6) + 2
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    settings = config(0.5, 32)
    create_compressed_model(layer, settings, init_loader=[batch])
    expected = bias + (weight - layer.weight.detach()) @ batch.mean(0)
    assert float((layer.bias.detach() - bias).abs().max()) > 0.1
    torch.testing.assert_close(layer.bias.detach(), expected, rtol=1e-5, atol=1e-5)


def test_outputs_have_their_means_back_and_layers_without_bias_are_listed():
    wanted = network()(X).mean(0)
    controller, model = create_compressed_model(network(), config(), init_loader=LOADER)
    torch.testing.assert_close(model(X).mean(0), wanted, rtol=1e-5, atol=1e-5)
    report = controller.statistics().bias_correction.to_dict()
    assert report["tables"]["layers left alone: no bias, or never run"] == [{"layer": "2"}]
    rows = report["tables"]["corrected layers"]
    assert [row["layer"] for row in rows] == ["0", "4", "8"]
    for row in rows:
        assert row["after"] < 1e-6 < row["mean shift before"]
    assert controller.strip()[8].bias.equal(model[8].bias)


def test_masked_biases_stay_as_they_are():
    params = {"prune_first_conv": True, "multiple_of": 1}
    section = {**config()["compression"], "algorithm": "filter_pruning", "pruning_init": 0.25, "params": params}
    del section["sparsity_init"]
    before = network().state_dict()["0.bias"]
    _, model = create_compressed_model(network(), {"compression": section}, init_loader=LOADER)
    after, masked = model.state_dict()["0.bias"], model[0].bias == 0
    assert int(masked.sum()) == 4
    assert torch.equal(after[masked], before[masked])
    wanted, means = network()(X).mean(0), model(X).mean(0)
    torch.testing.assert_close(means, wanted, rtol=1e-5, atol=1e-5)


def test_without_compression_nothing_changes():
    before = network().state_dict()
    _, model = create_compressed_model(network(), config(0.0), init_loader=LOADER)
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_only_as_many_samples_as_asked_for():
    layer = nn.Linear(6, 4)
    bias, first, second = layer.bias.detach().clone(), torch.randn(8, 6), torch.randn(8, 6) + 5
    weight = layer.weight.detach().clone()
    create_compressed_model(layer, config(0.5, 8), init_loader=[first, second])
    expected = bias + (weight - layer.weight.detach()) @ first.mean(0)
    torch.testing.assert_close(layer.bias.detach(), expected, rtol=1e-5, atol=1e-5)


def test_training_mode_is_as_before():
    _, model = create_compressed_model(network().train(), config(), init_loader=LOADER)
    assert all(module.training for module in model.modules())


def test_data_is_needed():
    with pytest.raises(DataError, match="bias_correction"):
        create_compressed_model(network(), config())


def test_contradicting_requests_are_refused():
    second = {"algorithm": "quantization", "initializer": {"bias_correction": {"num_samples": 8}}}
    both = {"compression": [config()["compression"], second]}
    with pytest.raises(ConfigError, match="differs from"):
        create_compressed_model(network(), both, init_loader=LOADER)


def test_it_cannot_run_again():
    controller, _ = create_compressed_model(network(), config(), init_loader=LOADER)
    with pytest.raises(UsageError, match="is gone when creation is over"):
        controller.initialize("bias_correction")
