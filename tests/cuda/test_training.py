"""Created, calibrated, fine-tuned and stripped on a device, a model is what it is on the CPU; in float64, to rounding."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from compress_core import create_compressed_model
from tests.cuda.runs import CPU, Run, assert_close, assert_on, batches, network
from tests.sections import ADAPTATION, SECTIONS, pruning, quantization, quantized_as_without_compiler, sparsity

pytestmark = pytest.mark.cuda
RANGES = ("min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile")
CASES = {
    **SECTIONS,
    "sparsity, each step": [sparsity(update_per_optimizer_step=True, steps_per_epoch=2, sparsity_target=0.8)],
    "sparsity, normed": [sparsity(weight_importance="normed_abs", sparsity_target=0.8)],
    "adapted": [{**sparsity(), "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}}],
    "reconstructed sparsity": [{**sparsity(), "initializer": {"weight_reconstruction": {"num_samples": 32}}}],
    "reconstructed pruning": [{**pruning(), "initializer": {"weight_reconstruction": {"num_samples": 32}}}],
    "reconstructed pruning, measured": [
        {**pruning(filter_importance="reconstruction"), "initializer": ADAPTATION},
    ],
    "reconstructed 4 bits": [
        {
            **quantization(per_channel=True, root={"bits": 4}),
            "initializer": {"weight_reconstruction": {"num_samples": 32}, "range": {"num_init_samples": 16}},
        }
    ],
    "corrected without data": [{**sparsity(), "initializer": {"data_free_correction": {}}}],
    **{
        f"ranges, {kind}": [
            quantization("asymmetric", per_channel=True)
            | {"initializer": {"range": {"type": kind, "num_init_samples": 48}}}
        ]
        for kind in RANGES
    },
}


def report(run):
    """Returns the statistics, without times."""
    return json.loads(json.dumps(run.controller.statistics().to_dict()), object_hook=without_seconds)


def without_seconds(part):
    return {key: value for key, value in part.items() if "seconds" not in key}


def about(value):
    """Sums over a device differ in their last bits."""
    if isinstance(value, dict):
        return {key: about(part) for key, part in value.items()}
    if isinstance(value, list):
        return [about(part) for part in value]
    return pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(name, device):
    with quantized_as_without_compiler():
        expected, found = (Run(CASES[name], where, torch.float64) for where in (CPU, device))
        assert_on(found.model, device)
        assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-6, atol=1e-9)
        assert found.train() == pytest.approx(expected.train(), rel=1e-6)
        assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-6, atol=1e-8)
        assert found.controller.compression_stage() == expected.controller.compression_stage()
        assert report(found) == about(report(expected))
        torch.testing.assert_close(found.outputs(), expected.outputs(), rtol=1e-6, atol=1e-8)
        stripped, wanted = found.controller.strip(), expected.controller.strip()
        assert_on(stripped, device)
        assert_close(stripped.state_dict(), wanted.state_dict(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.outputs(stripped), expected.outputs(wanted), rtol=1e-6, atol=1e-8)


def test_shrinking_with_its_optimizer(device):
    expected, found = (Run([pruning(), sparsity()], where, torch.float64) for where in (CPU, device))
    for run in (expected, found):
        run.train(1)
        run.controller.shrink(run.optimizer)
    assert_on(found.model, device)
    assert found.train(1) == pytest.approx(expected.train(1), rel=1e-6)
    assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-6, atol=1e-8)
    assert found.model.conv1.weight.shape[0] < network().conv1.weight.shape[0]


def test_moving_a_compressed_model_is_creating_it_there(device):
    with quantized_as_without_compiler():
        created, moved = Run(CASES["all"], device, torch.float64), Run(CASES["all"], CPU, torch.float64)
        moved.model.to(device)
        moved.device = device
        assert_on(moved.model, device)
        assert moved.train() == pytest.approx(created.train(), rel=1e-6)
        assert_on(copy.deepcopy(moved.model).cpu(), CPU)


def test_levels_and_ranges_can_be_set_there(device):
    sections = [pruning(), sparsity(), quantization()]
    for_both = []
    with quantized_as_without_compiler():
        for where in (CPU, device):
            run = Run(sections, where, torch.float64)
            run.controller.set_sparsity_level(0.7)
            run.controller.set_pruning_level(0.5)
            run.controller.init_range()
            run.controller.adapt_batchnorm(batches_of(torch.float64), num_samples=32)
            for_both.append(run)
    expected, found = for_both
    assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-6, atol=1e-9)


def batches_of(dtype):
    return [(inputs.to(dtype), labels) for inputs, labels in batches()]


@pytest.mark.parametrize("method", ["paired", "exact", "momentum"])
def test_adaptation_in_float32(method, device):
    section = sparsity() | {
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 64, "method": method}}
    }
    expected, found = (Run([section], where) for where in (CPU, device))
    assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_failed_creation_leaves_everything_there(device):
    model = network(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    class Broken:
        def __iter__(self):
            yield batches()[0]
            torch.rand(3, device=device)
            raise OSError("the disk is gone")

    config = {"input_info": {"sample_size": [4, 3, 8, 8]}, "compression": CASES["all"]}
    with pytest.raises(Exception, match="the disk is gone"):
        create_compressed_model(model, config, init_loader=Broken())
    assert list(model.state_dict()) == list(before)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(after, generator)
