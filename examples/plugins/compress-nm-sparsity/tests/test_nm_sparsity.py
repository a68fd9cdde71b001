"""The contract by the conformance kit, the pattern against numbers that can be worked out by hand."""

import json

import pytest
import torch
from compress_nm_sparsity import nm_mask
from torch import nn

from compress_core import CompressionStage, ConfigError, create_compressed_model, load_compressed_model
from compress_core.testing import Case, conformance_checks

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))


def section(**values):
    return {"algorithm": "nm_sparsity", **values}


def create(*sections, **keywords):
    config = {"input_info": {"sample_size": [4, 3, 8, 8]}, "compression": list(sections)}
    return create_compressed_model(network(), config, **keywords)


def zeros_of_blocks(weight, m):
    rows = weight.detach().movedim(1, -1)
    covered = rows.shape[-1] // m * m
    return (rows[..., :covered].unflatten(-1, (-1, m)) == 0).sum(-1), rows[..., covered:]


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract(check):
    check(Case(network, (X,), {"compression": section(duration=2)}))


def test_the_smallest_of_each_block_go():
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0, 0.5, 0.1, -0.2, 0.9, 7.0, 7.0]])
    expected = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1, 1, 1]]).bool()
    assert torch.equal(nm_mask(weight, 2, 4), expected)
    # Half of the blocks: first the second, which loses 0.3 and not 3.
    expected[0, :4] = True
    assert torch.equal(nm_mask(weight, 2, 4, share=0.5), expected)


def test_blocks_of_a_convolution_run_along_its_input_channels():
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])
    weight[0, :, 0, 1] = torch.tensor([4.0, 3, 2, 1])
    expected = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]]).bool().view(1, 4, 1, 2)
    assert torch.equal(nm_mask(weight, 2, 4), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
def test_every_block_of_the_plain_model_has_its_zeros(n, m):
    controller, _ = create(section(n=n, m=m))
    plain = controller.strip()
    for weight in (plain[2].weight, plain[6].weight):
        zeros, rest = zeros_of_blocks(weight, m)
        assert bool((zeros == m - n).all())
        assert bool((rest != 0).all())
    assert "has 3 input channels" in str(controller.get_compression_state()["algorithms"]["nm_sparsity"]["plan"])
    rows = controller.statistics().nm_sparsity.to_dict()["tables"]["N:M layers"]
    assert [row["inputs left dense"] for row in rows] == [16 % m, 10 % m]
    covered = 10 * 9 * (16 // m * m) + 4 * (10 // m * m)
    assert controller.compression_rate == pytest.approx(covered * (1 - n / m) / (10 * 9 * 16 + 4 * 10))


def test_schedule_masks_block_by_block():
    controller, model = create(section(start_epoch=1, duration=2))
    reached = []
    for _ in range(5):
        controller.scheduler.epoch_step()
        reached.append(controller.statistics().nm_sparsity.values["masked_blocks"])
    # The density decays from 1 to a half: after half of the time it is the root of a half.
    assert reached == pytest.approx([0, 0, (1 - 0.5**0.5) / 0.5, 1, 1])
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert bool((zeros_of_blocks(model[2].weight, 4)[0] == 2).all())


def pruned():
    params = {"prune_first_conv": True, "multiple_of": 1}
    pruning = {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": params}
    return create(pruning, section())


def test_pattern_is_renewed_where_channels_go():
    controller, model = pruned()
    plain = controller.strip()
    for found in (plain, model):
        if found is model:
            controller.shrink()
        assert found[2].weight.shape[1] == 12
        zeros, rest = zeros_of_blocks(found[2].weight, 4)
        assert bool((zeros == 2).all())
        assert bool((rest != 0).all())
    rows = controller.statistics().nm_sparsity.to_dict()["tables"]["N:M layers"]
    assert [(row["inputs"], row["inputs left dense"]) for row in rows] == [(12, 0), (7, 3)]


def test_shrunk_model_is_resumed():
    controller, model = pruned()
    controller.shrink()
    state = json.loads(json.dumps(controller.get_compression_state()))
    config = {"compression": [{"algorithm": "filter_pruning", "pruning_init": 0.3}, section()]}
    config["compression"][0]["params"] = {"prune_first_conv": True, "multiple_of": 1}
    _, resumed = create_compressed_model(network(), config, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(X), model.eval()(X))


def test_plain_shrunk_model_is_loaded():
    controller, _ = pruned()
    plain = controller.strip()
    loaded = load_compressed_model(network(), plain.state_dict(), controller.shrink_plan)
    assert torch.equal(loaded.eval()(X), plain.eval()(X))


def test_a_block_that_keeps_all_is_refused():
    with pytest.raises(ConfigError, match=r"compression\.0\.nm_sparsity\.n: 4 of 4 weights would stay"):
        create(section(n=4))


def test_a_schedule_without_a_duration_is_refused():
    with pytest.raises(ConfigError, match="schedule"):
        create(section(schedule="exponential"))
