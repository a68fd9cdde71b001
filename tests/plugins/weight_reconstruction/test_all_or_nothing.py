"""Whatever fails, the model and the random numbers are as they were; what gets worse is rolled back."""

import json
import random
import threading

import numpy as np
import pytest
import torch

from compress_core import ConfigError, DataError, UsageError, create_compressed_model, register_default_init_args
from compress_core.transforms import raw_parameter
from compress_weight_reconstruction.layers import Layer
from tests.plugins.weight_reconstruction.helpers import (
    ConvNet,
    batches,
    copied,
    create,
    output_error,
    same,
    section,
    tensors,
    trained_convnet,
)

LAYERS = 4


@pytest.mark.parametrize("failing", range(LAYERS))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_at_any_layer_restores_everything(monkeypatch, failing, error):
    solve, calls = Layer.solve, []

    def fail(self, damping):
        result = solve(self, damping)
        if len(calls) == failing:
            raise error("injected")
        calls.append(self.name)
        return result

    monkeypatch.setattr(Layer, "solve", fail)
    model, data = trained_convnet(), batches(3, 8, 8)
    before = tensors(model)
    with pytest.raises(error, match="injected"):
        create_compressed_model(model, {"compression": section(adapt=True)}, init_loader=data)
    assert same(tensors(model), before)
    assert type(model.conv1) is torch.nn.Conv2d
    assert not model.stem._forward_hooks
    assert not [t for t in threading.enumerate() if t.name == "weight reconstruction"]


def test_running_again_with_a_failure_restores_everything(monkeypatch):
    model, data = trained_convnet(), batches(3, 8, 8)
    original = copied(model)
    controller, _ = create(model, data)
    before = tensors(model)

    def fail(self, damping):
        self._parameter.data.zero_()
        raise ValueError("injected")

    monkeypatch.setattr(Layer, "solve", fail)
    with pytest.raises(ValueError, match="injected"):
        controller.initialize("weight_reconstruction", uncompressed_model=original)
    assert same(tensors(model), before)


def test_an_error_of_the_models_own_forward_comes_out():
    class Failing(ConvNet):
        def forward(self, x):
            if len(x) == 5:
                raise ZeroDivisionError("a batch of five")
            return super().forward(x)

    model = Failing().eval()
    before = tensors(model)
    data = [*batches(3, 8, 8, count=2), torch.randn(5, 3, 8, 8)]
    with pytest.raises(DataError, match="a batch of five"):
        create_compressed_model(model, {"compression": section()}, init_loader=data)
    assert same(tensors(model), before)


def test_random_generators_and_modes_stay():
    model, data = trained_convnet(), batches(3, 8, 8)
    model.train()
    model.norm.eval()
    loader = torch.utils.data.DataLoader(torch.cat(data), 16, shuffle=True, generator=torch.Generator().manual_seed(2))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), loader.generator.get_state()
    create(model, loader, section())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert torch.equal(loader.generator.get_state(), before[3])
    assert model.training and not model.norm.training and model.norm1.training


def test_two_runs_agree_bit_for_bit():
    found = []
    for _ in range(2):
        model = trained_convnet()
        create(model, batches(3, 8, 8))
        found.append(tensors(model))
    assert same(*found)


def test_nan_in_the_data_is_an_error_that_names_the_layer():
    data = batches(3, 8, 8)
    data[1][3] = torch.nan
    model = trained_convnet()
    before = tensors(model)
    with pytest.raises(DataError, match=r"stem\.weight.*(nan|NaN|finite)"):
        create_compressed_model(model, {"compression": section()}, init_loader=data)
    assert same(tensors(model), before)


def test_reconstruction_and_adaptation_together_beat_adaptation_alone():
    data, fresh = batches(3, 8, 8), batches(3, 8, 8, seed=77)
    original = trained_convnet()
    errors = []
    for sections in (section(adapt=True, num_samples=0), section(adapt=True)):
        model = copied(original)
        create_compressed_model(model, {"compression": sections}, init_loader=data)
        errors.append(output_error(model, original, fresh))
    assert errors[1] < 0.7 * errors[0]


def test_it_switches_itself_off_when_the_output_gets_worse(monkeypatch, caplog):
    solve = Layer.solve

    def spoil(self, damping):
        result = solve(self, damping)
        self._parameter.data.mul_(-1)
        return result

    monkeypatch.setattr(Layer, "solve", spoil)
    model = trained_convnet()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    _, report = create(model, batches(3, 8, 8))
    assert not report.kept
    assert "the error of the model's output would be" in report.reason
    assert "the weights stay as they were" in caplog.text
    assert all(torch.equal(raw_parameter(model, name), value) for name, value in before.items())
    assert all(torch.equal(model.get_buffer(name), value) for name, value in statistics.items())


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_guard_keeps_what_is_better_and_rolls_back_what_is_worse(gain):
    model, data = trained_convnet(), batches(3, 8, 8)
    original = copied(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    _, report = create(model, data, section(guard=lambda m: -gain * output_error(m, original, data)))
    assert report.kept == (gain > 0)
    assert (report.metric[1] > report.metric[0]) == (gain > 0)
    unchanged = all(torch.equal(raw_parameter(model, name), value) for name, value in before.items())
    assert unchanged == (gain < 0)


def test_guard_true_needs_a_registered_metric():
    config = {"compression": section(guard=True)}
    with pytest.raises(DataError, match=r"weight_reconstruction\.guard: is true, but no function is registered"):
        create_compressed_model(trained_convnet(), config, init_loader=batches(3, 8, 8))
    loaded = register_default_init_args(config, batches(3, 8, 8), model_eval_fn=lambda model: 1.0)
    controller, _ = create_compressed_model(trained_convnet(), loaded)
    assert controller.statistics().weight_reconstruction.report.metric == (1.0, 1.0)


def test_requests_are_merged_and_contradictions_refused():
    model, data = trained_convnet(), batches(3, 8, 8, count=10)
    second = {"algorithm": "quantization", "initializer": {"weight_reconstruction": {"num_samples": 128}}}
    _, report = create(model, data, section(), second)
    assert report.samples == 128
    second["initializer"]["weight_reconstruction"]["damping"] = 0.5
    with pytest.raises(ConfigError, match=r"weight_reconstruction\.damping.*choose one value"):
        create(trained_convnet(), data, section(damping=0.1), second)
    second["initializer"]["weight_reconstruction"] = {"guard": lambda model: 1.0}
    with pytest.raises(ConfigError, match=r"choose one guard"):
        create(trained_convnet(), data, section(guard=lambda model: 1.0), second)


def test_zero_samples_is_off():
    controller, _ = create_compressed_model(trained_convnet(), {"compression": section(num_samples=0)})
    assert "weight_reconstruction" not in controller.statistics().to_dict()


def test_missing_data_is_an_error_before_anything_is_touched():
    with pytest.raises(DataError, match=r"initializer\.weight_reconstruction: needs calibration data"):
        create_compressed_model(trained_convnet(), {"compression": section()})


def test_state_is_restored_and_running_again_needs_the_uncompressed_model():
    model, data = trained_convnet(), batches(3, 8, 8)
    original = copied(model)
    controller, report = create(model, data)
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed_controller, resumed = create_compressed_model(copied(original), {"compression": section()}, state)
    resumed.load_state_dict(model.state_dict())
    assert resumed_controller.statistics().weight_reconstruction.report == report
    with torch.no_grad():
        assert torch.equal(resumed(data[0]), model(data[0]))
    with pytest.raises(UsageError, match="uncompressed_model=model_before_compression"):
        resumed_controller.initialize("weight_reconstruction", loader=data)
    with pytest.raises(UsageError, match="takes uncompressed_model and num_samples, got speed"):
        resumed_controller.initialize("weight_reconstruction", loader=data, speed=1)
    found = resumed_controller.initialize("weight_reconstruction", loader=data, uncompressed_model=original)
    assert found.report.samples == 64
    assert found.report.kept or found.report.output_error[1] >= found.report.output_error[0]


def test_fewer_samples_where_memory_is_not_enough_and_it_is_said(caplog):
    _, report = create(trained_convnet(), batches(3, 8, 8), section(memory=1e-6))
    assert {layer.positions for layer in report.layers} == {16 * 16, 16}
    assert "16 instead of 64 samples are used in the first layers: the forwards of one sample hold" in report.notes[0]
    assert report.notes[0] in caplog.text
    assert report.kept


def test_batches_for_which_there_is_no_room_at_first_join_later():
    """Most is held in the first layers; the last one sees one number of each channel."""
    model = trained_convnet()
    _, report = create(model, batches(3, 8, 8), section(memory=0.0007))
    layers = {layer.name: layer.positions for layer in report.layers}
    assert layers["stem.weight"] < 64 * 16
    assert layers["fc.weight"] == 64
    assert "more in later layers" in report.notes[0]
    everything = create(trained_convnet(), batches(3, 8, 8))[1]
    assert report.output_error[1] == pytest.approx(everything.output_error[1], rel=0.5)


def test_a_loader_that_fills_the_same_tensor_again_gives_different_batches():
    class Refilling:
        def __iter__(self):
            kept = torch.empty(16, 3, 8, 8)
            for batch in batches(3, 8, 8):
                yield kept.copy_(batch)

    models = [trained_convnet() for _ in range(2)]
    create(models[0], Refilling())
    create(models[1], batches(3, 8, 8))
    assert same(tensors(models[0]), tensors(models[1]))


def test_frozen_batch_norms_stay_also_after_a_resume():
    model, data = trained_convnet(), batches(3, 8, 8)
    original = copied(model)
    model.train()
    model.norm1.eval()
    controller, report = create(model, data)
    assert report.norms == ("norm",)
    assert torch.equal(model.norm1.running_mean, original.norm1.running_mean)
    assert not torch.equal(model.norm.running_mean, original.norm.running_mean)
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed_controller, resumed = create_compressed_model(copied(original).eval(), {"compression": section()}, state)
    resumed.load_state_dict(model.state_dict())
    resumed_controller.initialize("weight_reconstruction", loader=data, uncompressed_model=original)
    assert torch.equal(resumed.norm1.running_mean, original.norm1.running_mean)
