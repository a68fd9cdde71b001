"""The contract by the conformance kit, k-means against optima that are known."""

import pytest
import torch
from compress_palettize import Palette, kmeans
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.testing import Case, conformance_checks
from compress_core.transforms import get_weight_transform

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))


def create(*sections):
    return create_compressed_model(network(), {"input_info": {"sample_size": [4, 3, 8, 8]}, "compression": [*sections]})


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract(check):
    expected = {"check_with_quantization": "refuses to share weights with quantization"}
    check(Case(network, (X,), {"compression": {"algorithm": "palettize", "bits": 3}}, expected_failures=expected))


def test_means_of_evenly_spread_values_are_those_of_equal_runs():
    assert kmeans(torch.arange(16.0).flip(0), 4).tolist() == [1.5, 5.5, 9.5, 13.5]


def test_well_separated_clusters_are_found():
    centers = torch.tensor([-5.0, -1.0, 2.0, 9.0])
    noise = torch.linspace(-0.1, 0.1, 101)  # its mean is 0
    assert kmeans((centers[:, None] + noise).flatten(), 4).tolist() == pytest.approx(centers.tolist(), abs=1e-6)


def test_few_values_are_kept_exactly():
    weight = torch.tensor([[0.25, -3.0, 0.25], [7.5, 7.5, 0.0]])
    assert torch.equal(Palette(weight, 4)(weight), weight)


def test_gradients_reach_codebook_and_weight():
    weight = nn.Parameter(torch.tensor([1.0, 1.2, 3.0, 0.0]))
    palette = Palette(weight, 2)
    (palette(weight) * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert palette.codebook.tolist() == pytest.approx([1.1, 3.0])
    assert palette.codebook.grad.tolist() == [11, 100]
    assert weight.grad.tolist() == [1, 10, 100, 1000]


def test_plain_weights_have_as_many_values_as_entries():
    controller, _ = create({"algorithm": "palettize", "bits": 2})
    plain = controller.strip()
    assert [len(plain[index].weight.unique()) for index in (0, 2, 6)] == [4, 4, 4]
    elements = 3 * 16 * 9 + 16 * 10 * 9 + 40
    assert controller.compression_rate == pytest.approx(1 - (2 * elements + 3 * 4 * 32) / (32 * elements))


def test_masks_and_pruned_channels_stay_zero():
    params = {"prune_first_conv": True, "multiple_of": 1}
    pruning = {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": params}
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    controller, model = create(pruning, sparsity, {"algorithm": "palettize", "bits": 3})
    expected = model.eval()(X)
    assert float((model[2].weight == 0).float().mean()) >= 0.5
    codebook = get_weight_transform(model, "2.weight", "palettize").codebook
    assert bool((codebook != 0).all()), "no entry is spent on zeros"
    plain = controller.strip()
    assert plain[2].weight.shape[:2] == (7, 12)
    torch.testing.assert_close(plain.eval()(X), expected, rtol=1e-5, atol=1e-5)


def test_weights_choose_anew_at_the_beginning_of_an_epoch():
    controller, model = create({"algorithm": "palettize", "bits": 1, "reassign_epochs": 1})
    palette = get_weight_transform(model, "2.weight", "palettize")
    low, high = palette.codebook.detach().sort().values
    with torch.no_grad():
        dict(model.named_parameters())["2.weight"].fill_(float(high))
    assert float(model[2].weight.min()) == low
    controller.scheduler.epoch_step()
    assert bool((model[2].weight == high).all())
    with torch.no_grad():
        dict(model.named_parameters())["2.weight"].fill_(float(low))
    controller.scheduler.epoch_step()
    assert bool((model[2].weight == high).all())


def test_quantization_of_the_same_weights_is_refused():
    with pytest.raises(ConfigError, match=r"palettize: the config has a section 'quantization' as well"):
        create({"algorithm": "quantization"}, {"algorithm": "palettize"})
