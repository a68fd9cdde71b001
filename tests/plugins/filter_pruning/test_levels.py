"""How many channels go at a level, and which: against independent computations in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress_core import CompressionStage, ConfigError, ModelError, UsageError
from tests.plugins.filter_pruning.pruning_helpers import Chain, gone, inputs, pruned, seen
from tests.zoo import ResidualNet


def rows(weight):
    return weight.detach().double().flatten(1).numpy()


def importance(weight, kind):
    filters = rows(weight)
    if kind == "L1":
        return np.abs(filters).sum(1)
    if kind == "L2":
        return np.sqrt((filters**2).sum(1))
    return np.array([sum(np.linalg.norm(a - b) for b in filters) for a in filters])


def flops_of(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["L1", "L2", "geometric_median"])
def test_the_least_important_channels_go(kind):
    plain = seen(Chain())
    controller, _ = pruned(copy.deepcopy(plain), 0.5, filter_importance=kind)
    expected = [
        np.argsort(importance(getattr(plain, n).weight, kind), kind="stable") for n in ("conv1", "conv2", "conv3")
    ]
    assert gone(controller) == {n: sorted(order[: len(order) // 2].tolist()) for n, order in enumerate(expected)}


def test_importance_of_a_residual_chain_is_the_sum_over_its_layers():
    torch.manual_seed(3)
    plain = seen(ResidualNet(), inputs())
    controller, _ = pruned(copy.deepcopy(plain), 0.5)
    groups = {tuple(layers): number for number, layers in controller.pruned_module_groups.items()}
    together = next(layers for layers in groups if len(layers) > 1)
    total = sum(importance(plain.get_submodule(layer).weight, "L2") for layer in together)
    assert gone(controller)[groups[together]] == sorted(np.argsort(total)[: len(total) // 2].tolist())


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.5, 0.74, 0.95])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_what_is_left_is_the_smallest_multiple_that_the_level_allows(level, multiple):
    controller, _ = pruned(seen(Chain((8, 20, 16))), level, multiple_of=multiple, pruning_target=0.95)
    left = [size - len(channels) for size, channels in zip((8, 20, 16), gone(controller).values(), strict=True)]
    for size, number in zip((8, 20, 16), left, strict=True):
        allowed = [n for n in [*range(multiple, size, multiple), size] if n >= size * (1 - level) - 1e-9]
        assert number == (min(allowed) if level else size)
    assert controller.pruning_level == pytest.approx(1 - sum(left) / 44)


def test_equal_filters_are_no_reason_to_prune_none_or_all():
    model = seen(Chain())
    for conv in (model.conv1, model.conv2, model.conv3):
        nn.init.constant_(conv.weight, 0.25)
    controller, _ = pruned(model, 0.5)
    assert gone(controller) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 4, 5], 2: [0, 1, 2, 3]}


def test_no_layer_dies():
    controller, model = pruned(seen(Chain()), 0.5, all_weights=True)
    with torch.no_grad():
        for name in ("conv1", "conv2"):
            getattr(model, name)._parameters["weight"].mul_(1e-6)
    controller.set_pruning_level(0.9)
    left = [size - len(channels) for size, channels in zip((8, 12, 8), gone(controller).values(), strict=True)]
    assert all(number >= math.ceil(size * 0.1) for number, size in zip(left, (8, 12, 8), strict=True))
    assert min(left) >= 1


def test_one_ranking_over_all_groups_with_weights_divided_by_their_norm():
    plain = seen(Chain())
    with torch.no_grad():
        plain.conv1.weight.mul_(100)  # the scale of a layer does not count
    controller, _ = pruned(copy.deepcopy(plain), 0.3, all_weights=True)
    scores = [
        importance(c.weight, "L2") / np.linalg.norm(rows(c.weight)) for c in (plain.conv1, plain.conv2, plain.conv3)
    ]
    everything = sorted((score, number, i) for number, s in enumerate(scores) for i, score in enumerate(s))
    count = round(0.3 * 28)
    expected = {number: sorted(i for _, n, i in everything[:count] if n == number) for number in range(3)}
    assert gone(controller) == expected
    assert controller.pruning_level == pytest.approx(count / 28)


@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_target_in_operations_is_reached_and_not_by_far(target, all_weights):
    plain = seen(Chain((16, 24, 16))).eval()
    x = inputs()
    full = flops_of(plain, x)
    controller, _ = pruned(copy.deepcopy(plain), target, pruning_flops_target=target, all_weights=all_weights)
    small = controller.strip().eval()
    share = 1 - flops_of(small, x) / full
    figures = controller.statistics().filter_pruning
    assert figures.full_flops * 4 == full
    assert figures.current_flops * 4 == flops_of(small, x)
    assert controller.flops_pruning_level == pytest.approx(share)
    assert controller.compression_rate == pytest.approx(share)
    assert target <= share < target + 0.12
    assert figures.current_parameters == sum(p.numel() for p in small.parameters())
    assert figures.full_parameters == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_target_in_parameters_is_reached_and_not_by_far(target, all_weights):
    plain = seen(Chain((16, 24, 16)))
    full = sum(p.numel() for p in plain.parameters())
    controller, _ = pruned(copy.deepcopy(plain), target, pruning_parameters_target=target, all_weights=all_weights)
    small = controller.strip()
    share = 1 - sum(p.numel() for p in small.parameters()) / full
    assert target <= share < target + 0.1
    assert controller.compression_rate == pytest.approx(share)
    assert controller.target_pruning_level == target
    assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED
    assert share < controller.maximal_compression_rate < 1
    assert "level set last (of parameters)" in controller.statistics().to_str()


def test_target_in_parameters_that_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(ConfigError, match=r"pruning_parameters_target: .*at most 0\.\d+ of this model's parameters"):
        pruned(seen(Chain()), 0.0, pruning_parameters_target=0.999, multiple_of=8)


def test_target_in_operations_that_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(ConfigError, match=r"pruning_flops_target.*cannot be reached: at most 0\.\d+"):
        pruned(seen(Chain()), 0.0, pruning_flops_target=0.999, multiple_of=8)


def test_a_level_for_each_group():
    controller, _ = pruned(seen(Chain()), 0.0)
    controller.set_pruning_level({0: 0.25, 2: 0.75})
    assert [len(channels) for channels in gone(controller).values()] == [2, 0, 6]
    controller.set_pruning_level({1: 0.5})
    assert [len(channels) for channels in gone(controller).values()] == [2, 6, 6]


@pytest.mark.parametrize("level", [-0.1, 1.0, 1, float("nan"), True, "0.5", None, {0: 1.5}])
def test_levels_out_of_range_are_refused(level):
    controller, _ = pruned(seen(Chain()), 0.5)
    before = gone(controller)
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        controller.set_pruning_level(level)
    assert gone(controller) == before


def test_groups_that_do_not_exist_are_refused():
    controller, _ = pruned(seen(Chain()), 0.5)
    with pytest.raises(UsageError, match="no group 3; groups are 0 to 2"):
        controller.set_pruning_level({3: 0.5})


def test_frozen_masks_stay():
    controller, _ = pruned(seen(Chain()), 0.5)
    controller.freeze()
    with pytest.raises(UsageError, match="frozen"):
        controller.set_pruning_level(0.1)
    controller.compression_rate = 0.25
    assert controller.frozen
    assert controller.pruning_level == pytest.approx(0.25)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = seen(Chain())
    with torch.no_grad():
        model.conv2.weight[3, 1, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"conv2\.weight"):
        pruned(model, 0.5)


def test_stage_is_measured():
    controller, _ = pruned(seen(Chain()), 0.0, pruning_target=0.5)
    stages = []
    for level in (0.0, 0.25, 0.5, 0.6):
        controller.set_pruning_level(level)
        stages.append(controller.compression_stage())
    assert stages == [
        CompressionStage.UNCOMPRESSED,
        CompressionStage.PARTIALLY_COMPRESSED,
        CompressionStage.FULLY_COMPRESSED,
        CompressionStage.FULLY_COMPRESSED,
    ]
