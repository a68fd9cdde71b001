"""README and docs say what is so: their code runs, their tables are complete, their links lead somewhere."""

import inspect
import json
import re
import sys
import types
import typing
import unittest

import pytest
import torch
from torch import nn

from compress_core import AlgorithmConfig, create_compressed_model
from compress_core.contract import hookspecs
from compress_core.registry.checks import hook_names
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PLUGINS = (ROOT / "docs" / "plugins.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    quickstart = blocks(README, "python")[0]
    assert len([line for line in quickstart.splitlines() if line.strip()]) == 15
    project = types.ModuleType("my_project")
    project.model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    project.loader = [(torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))) for _ in range(8)]
    monkeypatch.setitem(sys.modules, "my_project", project)
    (tmp_path / "config.json").write_text(blocks(README, "json")[0])
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(quickstart, space)
    assert "level of the sparsified layers" in capsys.readouterr().out
    assert space["controller"].sparsity_level == pytest.approx(0.5, abs=1e-3)
    assert space["controller"].statistics().batchnorm_adaptation.report.samples == 256
    weights = [p for p in space["controller"].strip().parameters() if p.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.5, abs=1e-3)


def readme_plugin(monkeypatch):
    source = next(block for block in blocks(README, "python") if "RandomSparsity" in block)
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    module = types.ModuleType("random_sparsity")
    monkeypatch.setitem(sys.modules, "random_sparsity", module)
    exec(source, module.__dict__)
    return module


def test_plugin_of_the_readme_keeps_every_promise(registry, monkeypatch):
    from compress_core.testing import Case, run_checks
    from tests.zoo import ResidualNet, images

    registry.register(readme_plugin(monkeypatch), "random_sparsity")
    section = {"algorithm": "random_sparsity", "level": 0.7, "initializer": {"batchnorm_adaptation": {}}}
    config = {"compression": section}
    report = run_checks(Case(ResidualNet, (images(),), config, loader=[images(16)] * 2))
    assert report.failed == {}
    controller, model = create_compressed_model(ResidualNet(), config, init_loader=[images(16)])
    assert 0.6 < float((model.conv2.weight == 0).float().mean()) < 0.8
    assert controller.statistics().batchnorm_adaptation.report.samples == 16


def test_checkpoint_example_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    """The example, interrupted after each epoch, ends as it does in one go."""
    (example,) = blocks((ROOT / "docs" / "checkpoints.md").read_text(), "python")
    data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))

    class StoppedError(Exception):
        pass

    def run(folder, epochs_in_a_row):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        left = [epochs_in_a_row]

        def train_one_epoch(controller, model, optimizer):
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            controller.scheduler.epoch_step()
            for inputs, labels in torch.utils.data.DataLoader(data, batch_size=4, shuffle=True):
                controller.scheduler.step()
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

        torch.manual_seed(1)
        config = {"compression": {"algorithm": "magnitude_sparsity", "params": {"sparsity_target_epoch": 3}}}
        space = {
            "torch": torch,
            "config": config,
            "epochs": 4,
            "train_one_epoch": train_one_epoch,
            "make_model": lambda: nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.2), nn.Linear(32, 3)),
        }
        try:
            exec(example, space)
        except StoppedError:
            assert epochs_in_a_row < 4
        return space

    whole = run(tmp_path / "whole", 4)
    for _ in range(4):
        pieces = run(tmp_path / "pieces", 1)
    assert pieces["first"] == 3
    for name, tensor in whole["model"].state_dict().items():
        assert torch.equal(pieces["model"].state_dict()[name], tensor), name


# It has neither a loss nor a rate nor data, and nobody asks for Inductor.
NOT_FOR_IT = [
    "check_loss",
    "check_rate_is_counted",
    "check_rolls_back_from_every_forward",
    "check_rolls_back_from_the_loader",
    "check_inductor_eval",
    "check_inductor_train",
]


def test_conformance_example_of_the_docs_runs(registry, monkeypatch):
    registry.register(readme_plugin(monkeypatch), "random_sparsity")
    space = {}
    exec(next(block for block in blocks(PLUGINS, "python") if "conformance_checks" in block), space)
    skipped = []
    for check in space["conformance_checks"]():
        try:
            space["test_contract"](check)
        except unittest.SkipTest:
            skipped.append(check.__name__)
    assert skipped == NOT_FOR_IT


def test_table_of_hooks_is_the_contract():
    rows = re.findall(r"^\| `(compress_\w+)` \| (.*?) \|", PLUGINS, re.MULTILINE)
    documented = {name: tuple(re.findall(r"`(\w+)`", arguments)) for name, arguments in rows}
    assert documented == hook_names()


def test_contract_is_the_committed_snapshot():
    """Whoever changes the contract changes this file too, and sees that third parties are affected."""
    snapshot = json.loads((ROOT / "tests" / "docs" / "hooks.json").read_text())
    assert {name: list(arguments) for name, arguments in hook_names().items()} == snapshot


def test_every_argument_of_a_hook_is_documented():
    for name, arguments in hook_names().items():
        doc = inspect.getdoc(getattr(hookspecs, name))
        for argument in arguments:
            assert f"    {argument}: " in doc, f"{name}: {argument}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"`[^`\n]*`", "", document.read_text())  # what stands in code is no link
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (document.parent / target).exists(), target


def test_readme_is_short():
    assert len(README.splitlines()) < 150


def test_public_names_are_importable_and_documented():
    import compress_core

    for name in compress_core.__all__:
        value = getattr(compress_core, name)
        assert name == "hookimpl" or inspect.getdoc(value), name


@pytest.mark.parametrize("algorithm", ["magnitude_sparsity", "filter_pruning", "quantization"])
def test_keys_of_the_docs_are_the_keys_of_the_schema(registry, algorithm):
    text = (ROOT / "docs" / f"{algorithm}.md").read_text()
    fields = registry.section_class(algorithm).model_fields["params"].annotation.model_fields
    documented = set(re.findall(r"`params\.(\w+)`", text))
    assert documented == set(fields)


def test_keys_of_quantization_are_all_documented(registry):
    text = (ROOT / "docs" / "quantization.md").read_text()
    config, common = registry.section_class("quantization"), AlgorithmConfig.model_fields
    sections = {"", "initializer.", "weights.", "activations.", "scope_overrides.", "params."}

    def leaves(section, prefix=""):
        for name, field in section.model_fields.items():
            if f"{prefix}{name}." in sections:
                yield from leaves(field.annotation, f"{prefix}{name}.")
            elif prefix or name not in common:
                yield f"{prefix}{name}"

    documented = set(re.findall(r"`([\w.]+)`", text[text.index("## Keys") : text.index("## Ranges")]))
    assert set(leaves(config)) - documented - {f"initializer.{name}" for name in SHARED} == set()


def test_keys_of_distillation_are_all_documented(registry):
    text = (ROOT / "docs" / "knowledge_distillation.md").read_text()
    config = registry.section_class("knowledge_distillation").model_fields
    (pair,) = typing.get_args(config["features"].annotation)
    schedule = config["weight_schedule"].annotation
    keys = {*config, *pair.model_fields, *schedule.model_fields} - set(AlgorithmConfig.model_fields)
    assert {key for key in keys if not re.search(rf"`(?:weight_schedule\.)?{key}`", text)} <= {"weight_schedule"}


# Shared initializers and their pages.
SHARED = {
    "batchnorm_adaptation": "adaptation.md",
    "weight_reconstruction": "reconstruction.md",
    "data_free_correction": "reconstruction.md",
}


def test_keys_of_shared_initializers_are_documented_on_their_pages(registry):
    section = registry.section_class("quantization").model_fields["initializer"].annotation
    found = {name for name in section.model_fields if name in SHARED}
    assert found == set(SHARED)
    for name, page in SHARED.items():
        (config,) = (c for c in typing.get_args(section.model_fields[name].annotation) if c is not type(None))
        documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE))
        assert set(config.model_fields) <= documented, page


def test_every_hook_has_an_example_that_parses():
    import ast
    import textwrap

    for name in hook_names():
        example = blocks(inspect.getdoc(getattr(hookspecs, name)), "python")
        assert len(example) == 1, name
        (function,) = ast.parse(textwrap.dedent(example[0])).body
        assert function.name == name
        assert {argument.arg for argument in function.args.args} <= {"self", *hook_names()[name]}
