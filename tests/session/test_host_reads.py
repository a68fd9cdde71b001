"""A training step queues its work and reads nothing back from the device: a law that needs no GPU to be checked."""

from __future__ import annotations

import contextlib
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from compress_core.contract.hookspecs import ENTRY_POINT_GROUP
from tests.conftest import ROOT
from tests.host_reads import host_reads
from tests.sections import SECTIONS, pruning, quantization, quantized_as_without_compiler, sparsity
from tests.zoo import ZOO, MobileNet, ResidualNet, images, trained_model

X = torch.tensor([1.0, -2.0, 0.0])


def reads_of(function):
    with host_reads() as found:
        function()
    return found


# The instrument itself.


@pytest.mark.parametrize(
    "function",
    [
        lambda: X.sum().item(),
        lambda: bool(X.any()),
        lambda: X[0] or X,
        lambda: float(X[0]),
        lambda: [0, 1, 2][X[0].long()],
        lambda: 1.0 in X,
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: X.to(device=torch.device("cpu")),
        lambda: X.nonzero(),
        lambda: torch.where(X > 0),
        lambda: X[X > 0],
        lambda: X.masked_select(X > 0),
        lambda: X.equal(X),
        lambda: X.unique(),
        lambda: torch.tensor([1.0]),
        lambda: torch.as_tensor([1.0]),
        lambda: X.new_tensor([1.0]),
        lambda: torch.linalg.inv(torch.eye(3)),
        lambda: torch.bincount(X.abs().long()),
    ],
)
def test_what_waits_is_found(function):
    assert reads_of(function)


def test_what_does_not_wait_is_not_found():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)),
        torch.ones(2, 3, 4, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.zeros(2, dtype=torch.long)).backward()
        optimizer.step()
        torch.where(x > 0, x, 0.0).masked_fill(x > 1, 2.0).clamp(max=x.amax()).to(torch.float64)

    assert reads_of(step) == []


def test_the_place_is_told():
    (found,) = [line for line in reads_of(lambda: X.tolist()) if "tolist" in line]
    assert "test_host_reads.py" in found


# The law.


def reads_of_a_step(
    make_model, inputs, sections, *, root=None, prepare=lambda controller: None, autocast=False, epochs=2
):
    """Returns what the second step of an epoch reads."""
    info = {"sample_size": list(inputs[0].shape)}
    config = {"target_device": "TRIAL", "compression": sections, "input_info": info, **(root or {})}
    if not inputs[0].is_floating_point():
        config["input_info"] |= {"type": "long", "filler": "zeros"}
    with quantized_as_without_compiler():
        controller, model = create_compressed_model(make_model(), config, init_loader=[(inputs[0], 0)])
    prepare(controller)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()

    def step():
        controller.scheduler.step()
        optimizer.zero_grad()
        with context:
            loss = model(*inputs).float().square().mean() + controller.loss()
        loss.backward()
        optimizer.step()

    found = []
    with quantized_as_without_compiler():
        for _ in range(epochs):
            controller.scheduler.epoch_step()
            step()
            found += reads_of(step)
    return found


@pytest.mark.parametrize("name", SECTIONS)
def test_of_every_algorithm(name):
    assert reads_of_a_step(lambda: trained_model("resnet"), (images(),), SECTIONS[name]) == []


@pytest.mark.parametrize("model", ["mobilenet", "transformer", "recurrent", "lstm"])
def test_of_every_kind_of_model(model):
    sections = [sparsity(), *SECTIONS["quantization, asymmetric per channel"]]
    assert reads_of_a_step(lambda: trained_model(model), ZOO[model][1](), sections) == []


@pytest.mark.parametrize("how", ["autocast", "recomputed", "channels_last"])
def test_of_every_way_to_train(how):
    memory_format = torch.channels_last if how == "channels_last" else torch.contiguous_format
    found = reads_of_a_step(
        lambda: trained_model("resnet").to(memory_format=memory_format),
        (images().to(memory_format=memory_format),),
        SECTIONS["all"],
        root={"recompute_weights": how == "recomputed"},
        autocast=how == "autocast",
    )
    assert found == []


@pytest.mark.parametrize(
    "method", ["freeze_quantizers", "disable_weight_quantization", "disable_activation_quantization"]
)
def test_of_quantizers_that_are_frozen_or_off(method):
    def prepare(controller):
        getattr(controller, method)()

    assert reads_of_a_step(MobileNet, (images(),), SECTIONS["quantization, symmetric"], prepare=prepare) == []


def test_of_frozen_masks_that_each_step_computed_before():
    section = [sparsity(update_per_optimizer_step=True, steps_per_epoch=2)]
    # Before, each step ranks the weights anew, and that reads counts.
    assert reads_of_a_step(ResidualNet, (images(),), section)
    assert reads_of_a_step(ResidualNet, (images(),), section, prepare=lambda controller: controller.freeze()) == []


def test_of_distillation_from_outputs_and_features():
    features = [{"student": "bn1", "type": kind} for kind in ("mse", "cosine", "attention")]
    for outputs in ("mse", "softmax", "cosine"):
        distillation = {"algorithm": "knowledge_distillation", "type": outputs, "features": features}
        assert reads_of_a_step(lambda: trained_model("resnet"), (images(),), [sparsity(), distillation]) == []


def test_of_masks_of_large_weights():
    def make():
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))

    assert reads_of_a_step(make, (torch.randn(4, 512),), [sparsity(), quantization()]) == []


# Plugins of others.

OTHERS = {
    "lowrank": [{"algorithm": "lowrank", "rank": 1}],
    "nm_sparsity": [{"algorithm": "nm_sparsity", "n": 1, "m": 2, "duration": 1}],
    "palettize": [{"algorithm": "palettize", "bits": 2, "reassign_epochs": 1}],
    "random_sparsity": [{"algorithm": "random_sparsity"}],
    "extras": [pruning(filter_importance="hoyer", schedule="cosine")],
    "bias_correction": [{**sparsity(), "initializer": {"bias_correction": {"num_samples": 4}}}],
    "several": [{"algorithm": "lowrank", "rank": 1}, pruning(), {"algorithm": "nm_sparsity"}, quantization()],
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_example_plugins(name, registry, monkeypatch):
    for folder in sorted((ROOT / "examples" / "plugins").iterdir()):
        monkeypatch.syspath_prepend(str(folder))
    modules = ("lowrank", "nm_sparsity", "palettize", "extras", "bias_correction")
    names = [*(f"compress_{module}" for module in modules), "random_sparsity"]
    registry.load_entry_points([importlib.metadata.EntryPoint(found, found, ENTRY_POINT_GROUP) for found in names])
    assert not registry.failures

    def make():
        first = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(288, 5))

    assert reads_of_a_step(make, (images(),), OTHERS[name]) == []
