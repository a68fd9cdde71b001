"""What the section may say, and what it must not."""

import pytest
import torch
from torch import nn

from compress_core import ConfigError, DataError, check_config, create_compressed_model
from compress_filter_pruning.config import FilterPruningConfig
from compress_filter_pruning.config_checks import check_config as check_section
from tests.plugins.filter_pruning.pruning_helpers import Chain, config, pruned, seen


def refused(document, *parts):
    with pytest.raises(ConfigError) as caught:
        check_config(document)
    for part in parts:
        assert part in str(caught.value)


def test_both_targets():
    refused(config(0.0, pruning_target=0.5, pruning_flops_target=0.4), "params.pruning_flops_target", "choose one")


def test_a_target_in_parameters_beside_another():
    both = {"pruning_parameters_target": 0.5, "pruning_flops_target": 0.4}
    refused(config(0.0, **both), "params.pruning_parameters_target", "together with pruning_flops_target")
    refused(config(0.6, pruning_parameters_target=0.5), "params.pruning_parameters_target", "below pruning_init 0.6")


def test_target_below_the_initial_level():
    refused(config(0.6, pruning_target=0.5), "params.pruning_target", "0.5 is below pruning_init 0.6")


def test_a_target_that_nobody_gave_is_not_below_the_initial_level():
    check_config(config(0.6))
    for initial, target in ((0.6, 0.6), (0.1, 0.5)):
        assert FilterPruningConfig(algorithm="filter_pruning", pruning_init=initial).default_target == target


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pruning_target", 1.0),
        ("pruning_target", -0.1),
        ("pruning_steps", 0),
        ("pruning_steps", 2.5),
        ("multiple_of", 0),
        ("filter_importance", "L3"),
        ("schedule", "linear"),
        ("num_init_steps", -1),
        ("interlayer_ranking_type", "weighted_ranking"),
    ],
)
def test_values_out_of_range(key, value):
    refused(config(0.0, **{key: value}), f"params.{key}", str(value))


def test_misspelt_keys_get_a_suggestion():
    refused(config(0.0, prunning_target=0.5), "prunning_target", "pruning_target")


def test_values_that_have_no_effect_are_refused():
    refused(config(0.0, legr_params={"generations": 3}), "params.legr_params")
    refused(config(0.0, schedule="baseline", pruning_steps=5), "params.pruning_steps")


def test_defaults_are_those_of_nncf():
    document = {"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": {"algorithm": "filter_pruning"}}
    controller, _ = create_compressed_model(seen(Chain((16, 32, 16))), document)
    # The first convolution and the one with a stride stay; half of the other one is the target after 100 epochs.
    assert controller.pruned_module_groups == {0: ["conv2"]}
    assert controller.target_pruning_level == 0.5
    assert controller.pruning_level == 0
    reasons = controller.statistics().filter_pruning.skipped
    assert "prune_first_conv is false" in reasons["conv1.weight"]
    assert "prune_downsample_convs is false" in reasons["conv3.weight"]
    assert "the model returns it" in reasons["linear.weight"]


class Residual(nn.Module):
    """Two layers that are tied by an addition, and one that is not."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


def test_ignored_layers_take_those_that_they_are_tied_to_with_them():
    document = config(0.5)
    document["compression"]["ignored_scopes"] = ["stem"]
    controller, _ = create_compressed_model(Residual(), document)
    assert controller.pruned_module_groups == {0: ["inner"]}
    reasons = controller.statistics().filter_pruning.skipped
    assert "compression.filter_pruning.ignored_scopes.0 = 'stem'" in reasons["stem.weight"]
    assert reasons["outer.weight"].startswith("tied to 'stem.weight'")


def test_dead_scopes_are_refused():
    document = config(0.5)
    document["compression"]["ignored_scopes"] = ["no_such_layer"]
    with pytest.raises(ConfigError, match="no_such_layer"):
        create_compressed_model(seen(Chain()), document)


def test_a_model_with_nothing_to_prune_says_why():
    with pytest.raises(ConfigError, match=r"finds no channels that can be pruned \(0\.weight: .*the model returns it"):
        pruned(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.5)


def test_a_multiple_that_lets_nothing_go_is_refused():
    with pytest.raises(
        ConfigError, match=r"params\.multiple_of: 16 lets no channel go: the largest .* has 12 channels"
    ):
        pruned(seen(Chain()), 0.5, multiple_of=16)


def test_without_an_example_input():
    document = config(0.5)
    del document["input_info"]
    with pytest.raises(DataError, match="input_info"):
        create_compressed_model(seen(Chain()), document)


class Reshaped(nn.Module):
    """A size of a layer is written in the forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 64, 5)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.linear(x.view(-1, 8 * 64))


def test_sizes_that_are_written_in_the_code_are_found_before_training_begins():
    controller, _ = pruned(Reshaped(), 0.5)
    assert controller.pruned_module_groups == {0: ["conv1"]}
    assert "written in its code" in controller.statistics().filter_pruning.skipped["conv2.weight"]
    assert controller.strip().conv2.weight.shape == (8, 4, 3, 3)


@pytest.mark.parametrize("batch_norms", [True, False])
def test_masks_of_batch_norm(batch_norms):
    plain = seen(Chain())
    nn.init.ones_(plain.bn1.bias)
    controller, model = pruned(plain, 0.5, prune_batch_norms=batch_norms)
    lost = [i for i in range(8) if not model.conv1.weight[i].any()]
    assert len(lost) == 4
    assert bool((model.bn1.weight[lost] == 0).all()) is batch_norms
    assert bool((model.bn1.bias[lost] == 0).all()) is batch_norms
    assert bool((model.conv1.bias[lost] == 0).all())
    assert bool((model.conv2.weight[:, lost] == 0).all())
    controller.strip()  # agrees either way


def test_checks_do_not_count_as_reads():
    params = {"pruning_target": 0.4, "interlayer_ranking_type": "unweighted_ranking", "multiple_of": 2}
    values = {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": params}
    section = FilterPruningConfig.model_validate(values)
    check_section(section)
    unread = {leaf for leaf, _, read in section.given_leaves() if not read}
    # The schedule is to read these.
    assert unread == {"algorithm", "pruning_init", "params.pruning_target"}
