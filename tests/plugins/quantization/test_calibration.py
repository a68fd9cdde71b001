"""Calibration as a user meets it: data of every kind, what it sees, and what it leaves behind."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import (
    ConfigError,
    DataError,
    ModelError,
    QuantizationRangeInitArgs,
    create_compressed_model,
    register_default_init_args,
)
from tests.zoo import ResidualNet, images, trained


def document(**section):
    return {"compression": {"algorithm": "quantization", **section}}


def create(model, loader=None, *, root=None, **section):
    return create_compressed_model(model, {**document(**section), **(root or {})}, init_loader=loader)


class Small(nn.Module):
    """A convolution, ReLU and a linear layer; `scale` stretches what the convolution puts out."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4 * 36, 5)
        self.scale = scale

    def forward(self, x):
        return self.fc(self.relu(self.conv(x) * self.scale).flatten(1))


def expected_scale(samples):
    """mixed_min_max, symmetric, whole tensor: mean over samples of the largest magnitude, or minus the smallest value."""
    return torch.maximum(samples.flatten(1).abs().amax(1).mean(), -samples.min())


# What is seen.


def test_input_range_is_that_of_mixed_min_max():
    data = images(12) * torch.linspace(0.5, 2, 12).view(-1, 1, 1, 1)
    controller, _ = create(Small(), data.split(5))
    quantizer = controller.non_weight_quantizers["model/input 0|OUTPUT"]
    assert quantizer.signed
    torch.testing.assert_close(quantizer.scale, expected_scale(data).reshape(1))


def test_what_no_input_reaches_has_no_samples():
    class Queries(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("queries", torch.linspace(-35, 1, 144).view(4, 36))

        def forward(self, x):
            tokens = self.conv(x).flatten(2)
            return self.fc(F.scaled_dot_product_attention((-self.queries)[None], tokens, tokens).flatten(1))

    controller, _ = create(Queries(), images(8).split(4))
    # A constant is quantized where it is read, because the model may keep it.
    queries = controller.non_weight_quantizers["model/scaled_dot_product_attention#0 input 0|INPUT0"]
    assert queries.scale.item() == 35


def test_ranges_are_measured_with_quantized_weights_and_unquantized_activations():
    data = images(8)
    controller, model = create(Small(), [data])
    seen = []
    handle = model.conv.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    controller.disable_activation_quantization()
    with torch.no_grad():
        model(data)
    handle.remove()
    behind_relu = controller.non_weight_quantizers["relu|OUTPUT"]
    torch.testing.assert_close(behind_relu.scale, expected_scale(seen[0].relu()).reshape(1))
    assert not behind_relu.signed


def test_a_model_in_train_mode_is_calibrated_in_eval_mode_and_stays_in_train_mode():
    model = trained(ResidualNet(), (images(),))
    model.bn2.eval()
    twin = copy.deepcopy(model).eval()
    first, _ = create(model.train(), [images(8)])
    second, _ = create(twin, [images(8)])
    assert model.training and model.bn1.training
    for name, quantizer in first.all_quantizations.items():
        assert torch.equal(quantizer.scale, second.all_quantizations[name].scale), name
    modes = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert modes == {"bn1": True, "bn2": True}  # .train() turned it on before


def test_entries_with_different_numbers_of_samples_each_see_their_own():
    data = images(16) * torch.linspace(0.5, 2, 16).view(-1, 1, 1, 1)
    ranges = [
        {"target_scopes": ["{re}input"], "num_init_samples": 4, "type": "min_max"},
        {"ignored_scopes": ["{re}input"], "num_init_samples": 16, "type": "min_max"},
    ]
    controller, _ = create(Small(), data.split(4), initializer={"range": ranges})
    assert controller.all_quantizations["model/input 0|OUTPUT"].scale.item() == data[:4].abs().max()
    controller.init_range()
    assert controller.all_quantizations["model/input 0|OUTPUT"].scale.item() == data[:4].abs().max()


def test_no_samples_means_no_data_is_needed():
    controller, _ = create(
        Small(), root={"input_info": {"sample_size": [1, 3, 8, 8]}}, initializer={"range": {"num_init_samples": 0}}
    )
    assert all(quantizer.scale.eq(1).all() for quantizer in controller.all_quantizations.values())


# Data of every kind.


class Mapping(Small):
    def forward(self, image, mask=None):
        return super().forward(image)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.split(4),
        lambda x: [(part, torch.zeros(len(part))) for part in x.split(4)],
        lambda x: [{"image": part, "label": torch.zeros(len(part))} for part in x.split(4)],
        lambda x: [x.split(4)[0], x[:0], x.split(4)[1]],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=4),
        lambda x: QuantizationRangeInitArgs([[x]], forward_fn=lambda model, batch: model(batch[0])),
    ],
    ids=["tensors", "pairs", "dicts", "an empty batch", "loader", "forward_fn"],
)
def test_loaders_of_every_kind_give_the_same_ranges(make):
    model = Mapping()
    expected = expected_scale(images(8)).reshape(1)
    controller, _ = create(model, make(images(8)))
    first = next(iter(controller.non_weight_quantizers))
    assert first in ("model/input 0|OUTPUT", "model/input image|OUTPUT")
    torch.testing.assert_close(controller.non_weight_quantizers[first].scale, expected)


def test_one_shot_iterator_is_enough_where_it_is_read_once():
    root = {"input_info": {"sample_size": [1, 3, 8, 8]}}
    controller, _ = create(Small(), iter(images(8).split(4)), root=root)
    quantizer = controller.non_weight_quantizers["model/input 0|OUTPUT"]
    torch.testing.assert_close(quantizer.scale, expected_scale(images(8)).reshape(1))


def test_one_shot_iterator_that_two_need_is_refused_with_the_remedy():
    model = trained(ResidualNet(), (images(),))
    before = copy.deepcopy(model.state_dict())
    root = {"input_info": {"sample_size": [1, 3, 8, 8]}}
    section = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}}
    with pytest.raises(DataError, match="a generator that was read before is empty, give a fresh one or a DataLoader"):
        create(model, iter(images(8).split(4)), root=root, **section)
    assert list(model.state_dict()) == list(before)


def test_one_sample_is_enough():
    controller, model = create(trained(ResidualNet(), (images(),)).eval(), [images(1)])
    quantizer = controller.non_weight_quantizers["model/input 0|OUTPUT"]
    torch.testing.assert_close(quantizer.scale, expected_scale(images(1)).reshape(1))
    assert model(images(1)).isfinite().all()


def test_too_few_samples_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        create(Small(), [images(4)], initializer={"range": {"num_init_samples": 64}})
    assert "64 samples were asked for, the data loader gave 4" in caplog.text


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_activations_get_a_range_that_holds_them(value, mode):
    data = torch.full((4, 3, 8, 8), value)
    controller, model = create(Small(), [data], activations={"mode": mode})
    quantizer = controller.non_weight_quantizers["model/input 0|OUTPUT"]
    low, high = quantizer.range()
    assert low <= 0 <= high and low < high
    step = (high - low) / (quantizer.levels()[1] - quantizer.levels()[0])
    assert (quantizer(data) - data).abs().max() <= step.item() * 0.5 + 1e-6
    assert model(data).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error_that_names_the_place(bad):
    data = images(4)
    data[2, 0, 0, 0] = bad
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"'model/input 0\|OUTPUT' has 1 values of 768 that are not finite"):
        create(model, [data])
    assert type(model) is Small
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_input_that_is_a_mask_can_be_ignored_by_its_name():
    class Masked(Small):
        def forward(self, x, mask):
            return (super().forward(x) + mask).softmax(-1)

    mask = torch.tensor([0.0, 0, 0, 0, -torch.inf]).expand(4, -1)
    loader = [((images(4), mask), torch.zeros(4))] * 2
    with pytest.raises(DataError, match=r"'model/input 1\|OUTPUT' has 4 values .* put its name into ignored_scopes"):
        create(Masked(), loader)
    controller, model = create(Masked(), loader, ignored_scopes=["model/input 1|OUTPUT"])
    assert "model/input 1|OUTPUT" not in controller.non_weight_quantizers
    assert model(images(4), mask)[:, -1].tolist() == [0] * 4
    (entry,) = [entry for entry in controller.ledger if entry.path.endswith("ignored_scopes.0")]
    assert entry.modules == ("model/input 1|OUTPUT",)


def test_weights_that_are_not_finite_are_an_error_that_names_them():
    model = Small()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"the weight 'fc.weight' has 1 values of 720 that are not finite"):
        create(model, [images()])


# Branches.


class Branches(Small):
    """Takes the second convolution for bright images only."""

    def __init__(self):
        super().__init__()
        self.bright = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(self.bright(x)) if float(x.mean()) > 0.5 else x)


def test_a_quantizer_that_no_sample_reaches_is_an_error():
    # The first batch leads the trace through the branch, but calibration is asked for nothing but dark images.
    info = {"input_info": {"sample_size": [1, 3, 8, 8], "filler": "ones"}}
    model = Branches()
    with pytest.raises(DataError, match=r"no calibration sample reaches 1 of 3 .*'act\|OUTPUT'.*ignored_scopes"):
        create(model, [images(4) - 3], root=info)
    assert type(model) is Branches


def test_or_it_is_turned_off_with_a_warning_and_stays_off(caplog):
    info = {"input_info": {"sample_size": [1, 3, 8, 8], "filler": "ones"}, "unused_values": "warn"}
    controller, _model = create(Branches(), [images(4) - 3], root=info)
    assert "no calibration sample reaches 1 of 3" in caplog.text
    missed = controller.non_weight_quantizers["act|OUTPUT"]
    assert not missed.enabled
    controller.enable_activation_quantization()
    assert not missed.enabled
    state = controller.get_compression_state()
    resumed, _ = create_compressed_model(Branches(), document() | info, state)
    assert not resumed.non_weight_quantizers["act|OUTPUT"].enabled
    # Data that reaches it turns it on again.
    controller.context.config.register_extra_structs([QuantizationRangeInitArgs([images(4) + 3])])
    controller, _ = create_compressed_model(Branches(), document() | info, init_loader=[images(4) + 3])
    assert controller.non_weight_quantizers["act|OUTPUT"].enabled


# Again, later.


def test_init_range_follows_the_weights_and_fails_without_a_trace_of_it():
    loader = [images(8)]
    controller, model = create(Small(), loader)
    with torch.no_grad():
        model._modules["conv"]._parameters["weight"].mul_(4)
    before = controller.weight_quantizers["conv|WEIGHT"].scale.clone()
    controller.init_range()
    torch.testing.assert_close(controller.weight_quantizers["conv|WEIGHT"].scale, before * 4)
    kept = {name: q.scale.clone() for name, q in controller.all_quantizations.items()}
    with torch.no_grad():
        model._modules["conv"]._parameters["weight"].mul_(2)
    loader[0] = images(8) * float("nan")
    with pytest.raises(DataError, match="not finite"):
        controller.init_range()
    assert all(torch.equal(q.scale, kept[name]) for name, q in controller.all_quantizations.items())
    assert all(q.observer is None for q in controller.all_quantizations.values())


def test_init_range_without_data_says_what_to_do():
    state = create(Small(), [images()])[0].get_compression_state()
    controller, _ = create_compressed_model(Small(), document(), state)
    with pytest.raises(DataError, match=r"initializer.range: needs calibration data.*register_default_init_args"):
        controller.init_range()


def test_range_without_a_loader_is_an_error_and_nothing_is_touched():
    model = Small()
    root = {"input_info": {"sample_size": [1, 3, 8, 8]}}
    with pytest.raises(DataError, match=r"compression.quantization.initializer.range: needs calibration data"):
        create(model, root=root, initializer={"range": {"num_init_samples": 16}})
    assert type(model) is Small and not any("transforms" in name for name in model.state_dict())


def test_without_loader_and_without_range_section_there_is_one_warning(caplog):
    create(Small(), root={"input_info": {"sample_size": [1, 3, 8, 8]}})
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "no data to initialize the ranges of 2 activation quantizers" in caplog.text


# Together with batch norm.


def test_ranges_fit_the_statistics_that_adaptation_gives():
    torch.manual_seed(0)
    data = images(64)
    model = trained(ResidualNet(), (images(16),), steps=20).eval()
    section = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 64, "method": "exact"}}}
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.7, "params": {"sparsity_target": 0.7}}
    config = {"compression": [sparsity, {"algorithm": "quantization", **section}]}
    controller, _ = create_compressed_model(model, config, init_loader=data.split(16))
    ours = {name: quantizer.scale.clone() for name, quantizer in controller.non_weight_quantizers.items()}
    controller.init_range()  # behind the adapted statistics
    again = {name: quantizer.scale for name, quantizer in controller.non_weight_quantizers.items()}
    for name, scale in ours.items():
        assert torch.allclose(scale, again[name], rtol=0.03), (name, scale, again[name])


def test_registering_twice_takes_the_later_data():
    config = register_default_init_args(document(), [images(8)])
    register_default_init_args(config, [images(8) * 3])
    controller, _ = create_compressed_model(Small(), config)
    quantizer = controller.non_weight_quantizers["model/input 0|OUTPUT"]
    torch.testing.assert_close(quantizer.scale, 3 * expected_scale(images(8)).reshape(1))


def test_wrong_batches_are_an_error_with_path_and_remedy():
    with pytest.raises((DataError, ModelError, ConfigError), match=r"forward_fn|input_info"):
        create(Small(), [torch.zeros(2, 7)])
