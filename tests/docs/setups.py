"""What the pages leave to the reader: the names that their code uses, made before it runs.

A key is a page, or a page and the number of a block (the first is 0) that needs something else than those before it. Each
function gets the names of the page and adds to them; it runs in an empty folder.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.registry import default_registry

IMAGE = (3, 12, 12)


def network():
    first = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def batches(count=2):
    return [(torch.randn(16, *IMAGE), torch.randint(0, 4, (16,))) for _ in range(count)]


def config(**section):
    section.setdefault("algorithm", "quantization")
    return {"input_info": {"sample_size": [2, *IMAGE]}, "compression": section}


def compressed(space, **section):
    space["controller"], space["model"] = create_compressed_model(network(), config(**section), init_loader=batches())


def module_of(space, name):
    """A module with the names of the page, for a registry."""
    module = types.ModuleType(name)
    module.__dict__.update(space)
    return module


def start(space, monkeypatch):
    from examples.common import datasets, networks

    def small():
        part = torch.rand(64, 3, 32, 32), torch.randint(0, 10, (64,))
        return datasets.Dataset("cifar10", part, part)

    monkeypatch.setattr(datasets, "cifar10", small)
    monkeypatch.setattr(networks, "resnet56_cifar10", lambda: networks.ResNet(3, (4, 8), blocks=1).eval())


def accuracy_aware(space, monkeypatch):
    space.update(
        model=network(), loader=batches(), uncompressed_accuracy=50.0, validate=lambda model, *args, **kw: 50.0
    )


def export(space, monkeypatch):
    compressed(space)
    space["example_batch"] = torch.randn(2, *IMAGE)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.embedding = nn.Embedding(10, 8)

    def forward(self, pixels, ids):
        return self.conv(pixels).mean((2, 3)) + self.embedding(ids).mean(1)


def export_of_two_inputs(space, monkeypatch):
    batch = torch.randn(2, *IMAGE), torch.randint(0, 10, (2, 5))
    document = {"compression": {"algorithm": "quantization"}}
    space["controller"], _ = create_compressed_model(TwoInputs(), document, init_loader=[(*batch,)] * 2)
    space["batch"] = batch


def program_of_executorch(space, monkeypatch):
    document = config() | {"target_device": "xnnpack"}
    controller, _ = create_compressed_model(network(), document, init_loader=batches())
    space["images"] = torch.randn(2, *IMAGE)
    controller.export("model.pte", space["images"])


def filter_pruning(space, monkeypatch):
    from compress_core import load_compressed_model, register_default_init_args

    compressed(space, algorithm="filter_pruning", pruning_init=0.5)
    space.update(json=json, torch=torch, load_compressed_model=load_compressed_model, MyNetwork=network)
    space.update(register_default_init_args=register_default_init_args, document=config(algorithm="filter_pruning"))
    space.update(train_loader=batches(), val_loader=batches(), train_steps=lambda *args: None)
    space.update(validate=lambda model, loader: (50.0, 1.0), make_optimizer=lambda p: torch.optim.SGD(p, 0.01))


def from_nncf(space, monkeypatch):
    Path("resnet18_int8.json").write_text(json.dumps(config()))
    space.update(model=network(), train_loader=batches())


def distillation(space, monkeypatch):
    Path("config.json").write_text(json.dumps(config(algorithm="knowledge_distillation", type="softmax")))
    space.update(model=network(), large_model=network())


def learned_sparsity(space, monkeypatch):
    compressed(space, algorithm="rb_sparsity")
    space["torch"] = torch


def learning_rates(space, monkeypatch):
    compressed(space)
    space["torch"] = torch


def quantization(space, monkeypatch):
    compressed(space)
    document = register_loader(config())
    space.update(model=network(), config=document, epochs=2, loader=batches(), torch=torch)
    space.update(create_compressed_model=create_compressed_model, criterion=nn.CrossEntropyLoss())
    space["example_batch"] = torch.randn(2, *IMAGE)


def register_loader(document):
    from compress_core import register_default_init_args

    return register_default_init_args(document, batches())


def reconstruction(space, monkeypatch):
    from compress_core.transforms import ProjectingTransform

    space.update(torch=torch, ProjectingTransform=ProjectingTransform)


def planned(space, monkeypatch):
    import compress_core

    space.update(compress_core=compress_core, model=network())


def config_of_the_plan(space, monkeypatch):
    from tests.conftest import ROOT

    text = (ROOT / "docs" / "plan.md").read_text()
    Path("config.json").write_text(text.split("```json\n")[1].split("```")[0])


def logging_page(space, monkeypatch):
    from compress_core.data import progress

    monkeypatch.setattr(progress, "_shown", None)
    compressed(space, algorithm="magnitude_sparsity")
    space.update(epochs=2, optimizer=None, train_one_epoch=lambda *args: 1.0)


def figures_were_logged(space):
    import csv

    with Path("figures.csv").open(newline="") as file:
        assert [(row["epochs"], row["loss"]) for row in csv.DictReader(file)] == [("0", ""), ("1", "1.0"), ("2", "1.0")]


SETUPS = {
    "plan.md": planned,
    ("plan.md", 1): config_of_the_plan,
    "report.md": export,
    "start.md": start,
    "accuracy_aware.md": accuracy_aware,
    "export.md": export,
    ("export.md", 2): export_of_two_inputs,
    ("export.md", 3): program_of_executorch,
    "filter_pruning.md": filter_pruning,
    "from_nncf.md": from_nncf,
    "knowledge_distillation.md": distillation,
    "learned_sparsity.md": learned_sparsity,
    "logging.md": logging_page,
    ("loops.md", 3): learning_rates,
    "magnitude_sparsity.md": lambda space, monkeypatch: space.update(factor_of=lambda *args: torch.ones(())),
    "quantization.md": quantization,
    "reconstruction.md": reconstruction,
}


def importance_is_measured(space):
    from compress_core import Choice, hookimpl

    @hookimpl
    def compress_choices():
        return [Choice("magnitude_sparsity.weight_importance", "power", space["InputPower"]())]

    seen = []

    def factor_of(model, name, data):
        seen.append(name)
        return torch.ones_like(model.get_submodule(name.removesuffix(".weight")).weight)

    space["factor_of"] = factor_of
    module = types.ModuleType("power")
    module.compress_choices = compress_choices
    default_registry().register(module, "power")
    params = {"weight_importance": "power", "sparsity_target": 0.5}
    compressed(space, algorithm="magnitude_sparsity", sparsity_init=0.5, params=params)
    assert seen == ["0.weight", "3.weight", "7.weight"]
    assert abs(space["controller"].sparsity_level - 0.5) < 0.01


def method_chooses_bits(space):
    default_registry().register(module_of(space, "ends"), "ends")
    document = config(initializer={"precision": {"type": "ends"}}) | {"target_device": "TRIAL"}
    controller, _ = create_compressed_model(network(), document, init_loader=batches())
    text = controller.statistics().quantization.to_str()
    assert [line.split("│")[2].strip() for line in text.splitlines() if "WEIGHT" in line] == ["8", "4", "8"]


def schedule_is_followed(space):
    default_registry().register(module_of(space, "cosine"), "cosine")
    params = {"schedule": "cosine", "sparsity_target": 0.5, "sparsity_target_epoch": 2}
    compressed(space, algorithm="magnitude_sparsity", params=params)
    levels = []
    for _ in range(3):
        space["controller"].scheduler.epoch_step()
        levels.append(space["controller"].sparsity_level)
    assert levels[0] < levels[1] < levels[2]
    assert abs(levels[1] - 0.25) < 0.01
    assert abs(levels[2] - 0.5) < 0.01


def transform_keeps_blocks(space):
    from compress_core import Stage
    from compress_core.transforms import add_weight_transform

    model = network()
    kept = torch.zeros_like(model[0].weight, dtype=torch.bool)
    kept[:8] = True
    add_weight_transform(model, "0.weight", space["Blocks"](kept), stage=Stage.SPARSITY, key="blocks")
    assert int((model[0].weight == 0).sum()) == int((~kept).sum())


def file_is_written(name):
    def check(space):
        assert Path(name).stat().st_size > 0

    return check


def small_model_computes_the_same(space):
    inputs = torch.randn(2, *IMAGE)
    assert space["small"][3].out_channels == 8
    torch.testing.assert_close(space["model"].eval()(inputs), space["small"].eval()(inputs))


def saved_as_network(space):
    import re

    from tests.conftest import ROOT

    source = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trace.md").read_text(), re.DOTALL)[0]
    Path("network.py").write_text(source)
    sys.path.insert(0, str(Path.cwd()))


def step_is_trained(space):
    outputs = space["outputs"][0]
    assert outputs.shape == (2, 4)


# What has to hold after a block.
CHECKS = {
    ("plan.md", 1): file_is_written("plan.html"),
    ("report.md", 0): file_is_written("report.html"),
    ("start.md", 4): file_is_written("report.html"),
    ("start.md", 3): file_is_written("resnet56.onnx"),
    ("export.md", 0): file_is_written("model.onnx"),
    ("export.md", 1): file_is_written("layers.png"),
    ("export.md", 3): step_is_trained,
    ("filter_pruning.md", 2): small_model_computes_the_same,
    ("logging.md", 1): figures_were_logged,
    ("magnitude_sparsity.md", 0): importance_is_measured,
    ("mixed_precision.md", 0): method_chooses_bits,
    ("plugins.md", 0): schedule_is_followed,
    ("quantization.md", 2): file_is_written("model.onnx"),
    ("reconstruction.md", 0): transform_keeps_blocks,
    ("trace.md", 0): saved_as_network,
}
