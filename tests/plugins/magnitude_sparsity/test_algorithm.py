import copy
import json

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionError,
    CompressionStage,
    ModelError,
    UsageError,
    create_compressed_model,
    register_module,
)
from compress_core.transforms import raw_parameter
from tests.zoo import MobileNet, Recurrent, ResidualNet, StackedLSTM, Transformer, images, trained


def create(model, **section):
    return create_compressed_model(model, {"compression": {"algorithm": "magnitude_sparsity", **section}})[0]


def zeros(controller):
    return {layer.name: layer.zeros for layer in controller.statistics().magnitude_sparsity.layers}


def test_global_level_is_exact_and_ranks_by_normed_magnitude():
    model = trained(ResidualNet(), (images(),))
    controller = create(model, sparsity_init=0.37)
    weights = {n: raw_parameter(model, n).detach().double() for n in controller.sparsified_module_info}
    total = sum(w.numel() for w in weights.values())
    assert sum(zeros(controller).values()) == round(0.37 * total)
    importance = torch.cat([(w.abs() / w.norm()).flatten() for w in weights.values()])
    threshold = importance.sort().values[round(0.37 * total) - 1]
    for name, weight in weights.items():
        kept = model.get_submodule(name.rpartition(".")[0]).weight != 0
        expected = (weight.abs() / weight.norm()) > threshold
        assert torch.equal(kept, expected), name


def test_abs_importance_ignores_the_layers_norm():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.mul_(100)
    controller = create(model, sparsity_init=0.5, params={"weight_importance": "abs"})
    assert zeros(controller) == {"0.weight": 1, "1.weight": 99}  # the best weight of a layer stays


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.95])
def test_local_level_is_exact_in_each_layer(level):
    model = ResidualNet()
    params = {"sparsity_level_setting_mode": "local", "sparsity_target": 0.95}
    controller = create(model, sparsity_init=level, params=params)
    for layer in controller.statistics().magnitude_sparsity.layers:
        assert layer.zeros == round(level * layer.weights)


def test_constant_layer_is_not_emptied_and_level_zero_masks_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(model[0].weight, 1e-3)
    controller = create(model)
    assert sum(zeros(controller).values()) == 0
    for level in (0.5, 0.9):
        controller.set_sparsity_level(level)
        counts = zeros(controller)
        assert sum(counts.values()) == round(level * 128)
        assert all(count < 64 for count in counts.values())


def test_ties_are_broken_by_position():
    model = nn.Linear(10, 10, bias=False)
    nn.init.ones_(model.weight)
    create(model, sparsity_init=0.33)
    assert torch.equal(model.weight.flatten() != 0, torch.arange(100) >= 33)


def test_level_that_cannot_be_reached_is_reported_as_what_it_is():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    controller = create(model, params={"sparsity_target": 0.9})
    controller.set_sparsity_level(0.9)  # 4 weights, and one of each layer stays
    assert controller.sparsity_level == 0.5
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert controller.statistics().magnitude_sparsity.requested_level == 0.9


def test_every_weighted_layer_type():
    class MyConv(nn.Conv1d):
        pass

    layers = {
        "conv1": MyConv(2, 3, 3), "conv2": nn.Conv2d(2, 3, 3), "conv3": nn.Conv3d(2, 3, 3),
        "up1": nn.ConvTranspose1d(2, 3, 3), "up2": nn.ConvTranspose2d(2, 3, 3), "up3": nn.ConvTranspose3d(2, 3, 3),
        "linear": nn.Linear(3, 4), "embedding": nn.Embedding(5, 4), "bag": nn.EmbeddingBag(5, 4),
        "attention": nn.MultiheadAttention(4, 2), "cross": nn.MultiheadAttention(4, 2, kdim=6, vdim=6),
        "lstm": nn.LSTM(3, 4, proj_size=2), "cell": nn.LSTMCell(3, 4), "norm": nn.LayerNorm(4), "bn": nn.BatchNorm1d(3),
    }  # fmt: skip
    controller = create(nn.ModuleDict(layers), sparsity_init=0.5, params={"sparsity_level_setting_mode": "local"})
    found = set(controller.sparsified_module_info)
    plain = {f"{n}.weight" for n in ("conv1", "conv2", "conv3", "up1", "up2", "up3", "linear", "embedding", "bag")}
    attention = {"attention.in_proj_weight", "attention.out_proj.weight", "cross.out_proj.weight"}
    attention |= {f"cross.{x}_proj_weight" for x in "qkv"}
    recurrent = {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0", "cell.weight_ih", "cell.weight_hh"}
    assert found == plain | attention | recurrent


class Product(nn.Module):
    """A layer of a user, of which subclasses are registered."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.kernel


def test_registered_user_modules():
    @register_module("kernel", target_weight_dim_for_compression=0)
    class Mine(Product):
        pass

    @register_module(ignored_algorithms=["magnitude_sparsity"])
    class Exempt(Mine):
        pass

    model = nn.Sequential(Mine(), Exempt())
    controller = create(model, sparsity_init=0.5)
    assert controller.sparsified_module_info == ["0.kernel"]
    assert int((model[0].kernel == 0).sum()) == 8


def test_one_ignored_algorithm_may_be_a_word_and_what_is_no_name_is_refused():
    @register_module("kernel", ignored_algorithms="magnitude_sparsity")
    class Mine(Product):
        pass

    assert create(nn.Sequential(Mine(), nn.Linear(4, 4)), sparsity_init=0.5).sparsified_module_info == ["1.weight"]
    for arguments in ({"ignored_algorithms": [3]}, {"target_weight_dim_for_compression": "0"}):
        with pytest.raises(UsageError, match=r"register_module\(\)"):
            register_module(**arguments)
    with pytest.raises(UsageError, match=r"write @register_module\(\) above"):
        register_module(nn.Linear)


def test_masked_gradients_are_zero_and_weights_can_grow_back():
    model = nn.Linear(20, 20, bias=False)
    controller = create(model, sparsity_init=0.5)
    mask = (model.weight != 0).detach()
    model(torch.randn(4, 20)).square().sum().backward()
    gradient = raw_parameter(model, "weight").grad
    assert not gradient[~mask].any()
    assert gradient[mask].all()
    with torch.no_grad():
        raw_parameter(model, "weight")[~mask] += 10
    controller.set_sparsity_level(0.5)
    assert model.weight[~mask].abs().min() > 0


def test_frozen_masks_stay_and_say_so():
    model = nn.Linear(20, 20)
    controller = create(model, sparsity_init=0.25)
    controller.freeze()
    with pytest.raises(CompressionError, match=r"masks are frozen; call controller.freeze\(False\)"):
        controller.set_sparsity_level(0.5)
    for _ in range(95):
        controller.scheduler.epoch_step()
    assert controller.sparsity_level == 0.25
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    controller.freeze(False)
    controller.set_sparsity_level(0.5)
    assert controller.sparsity_level == 0.5


@pytest.mark.parametrize("level", [1.0, -0.1, 7, float("nan"), "0.5", True, None])
def test_levels_out_of_range(level):
    controller = create(nn.Linear(4, 4))
    with pytest.raises(CompressionError, match=r"a sparsity level must be a number in \[0, 1\), got"):
        controller.set_sparsity_level(level)
    assert controller.sparsity_level == 0


def test_level_of_one_layer():
    controller = create(ResidualNet())
    controller.set_sparsity_level(0.5, module_info="conv2")
    layers = {layer.name: layer for layer in controller.statistics().magnitude_sparsity.layers}
    assert layers["conv2.weight"].level == 0.5
    assert layers["conv1.weight"].zeros == 0
    with pytest.raises(CompressionError, match=r"'conv9' is not sparsified; choose one of conv1.weight, conv2.weight"):
        controller.set_sparsity_level(0.5, module_info="conv9")


def test_compression_rate_can_be_read_and_set():
    controller = create(ResidualNet(), params={"sparsity_target": 0.6})
    assert controller.compression_rate == 0
    controller.compression_rate = 0.6
    assert controller.compression_rate == pytest.approx(0.6, abs=1e-3)
    assert controller.frozen
    controller.compression_rate = 0.3
    assert controller.compression_rate == pytest.approx(0.3, abs=1e-3)


def test_level_change_with_adaptation_pairs_with_the_masks_before_it():
    model = trained(ResidualNet(), (images(),))
    loader = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    config = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}}
    controller, _ = create_compressed_model(model, config, init_loader=loader)
    trained(model, (images(),))  # the statistics belong to the masks of now
    controller.set_sparsity_level(0.3)
    statistics = copy.deepcopy(model.bn2.state_dict())
    controller.set_sparsity_level(0.3, run_batchnorm_adaptation=True)  # the same masks: nothing to adapt to
    for key, value in statistics.items():
        torch.testing.assert_close(model.bn2.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    controller.set_sparsity_level(0.9, run_batchnorm_adaptation=True)
    report = controller.statistics().batchnorm_adaptation.report
    assert report.method == "paired"
    assert max(layer.mean_shift for layer in report.layers) > 0.01


def test_failed_adaptation_leaves_masks_and_level():
    model = ResidualNet()

    def loader():
        raise KeyboardInterrupt
        yield

    class Once:
        def __iter__(self):
            return loader()

    controller = create_compressed_model(
        model, {"compression": {"algorithm": "magnitude_sparsity"}}, init_loader=Once()
    )[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        controller.set_sparsity_level(0.5, run_batchnorm_adaptation=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert controller.statistics().magnitude_sparsity.requested_level == 0


def test_level_change_with_adaptation_without_data_changes_nothing():
    controller = create(ResidualNet())
    with pytest.raises(CompressionError, match="needs calibration data"):
        controller.set_sparsity_level(0.5, run_batchnorm_adaptation=True)
    assert controller.sparsity_level == 0


def test_statistics_are_tables_and_json():
    controller = create(ResidualNet(), sparsity_init=0.5)
    statistics = controller.statistics()
    text = statistics.to_str()
    for part in ("level of the sparsified layers", "conv1.weight", "8x3x3x3", "target level"):
        assert part in text
    figures = json.loads(json.dumps(statistics.to_dict()))["magnitude_sparsity"]
    parameters = sum(p.numel() for p in controller.model.parameters())
    weights = sum(layer["weights"] for layer in figures["layers"])
    assert figures["sparsity_level"] == pytest.approx(0.5, abs=1e-3)
    assert figures["model_sparsity_level"] == pytest.approx(figures["sparsity_level"] * weights / parameters)


@pytest.mark.parametrize("make", [MobileNet, Transformer, Recurrent, StackedLSTM])
def test_ignored_layers_keep_their_weights_and_classes(make):
    model = make()
    name = "classifier" if make is MobileNet else "head"
    controller = create(model, sparsity_init=0.5, ignored_scopes=[name])
    assert not any(target.startswith(name) for target in controller.sparsified_module_info)
    # A shared tensor is left alone as a whole.
    assert make is not Transformer or "embedding.weight" not in controller.sparsified_module_info


def test_nan_weight_is_named_and_undone():
    model = ResidualNet()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"'conv2.weight' holds NaN or infinity"):
        create(model)
    assert type(model.conv2) is nn.Conv2d


def test_parametrized_layer_is_named_with_the_remedy():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"weight '0.weight' is computed by a parametrization.*ignored_scopes"):
        create(model)
    controller = create(model, ignored_scopes=["0"])
    assert controller.sparsified_module_info == ["1.weight"]
