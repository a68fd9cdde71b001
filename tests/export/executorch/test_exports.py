"""Exports for ExecuTorch: other algorithms, what is refused, wrong programs, and files after an error."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
import torch
from torch import nn

from compress_core import ExportError, create_compressed_model
from compress_core.errors import UsageError
from compress_core.transforms import activation_transforms
from tests.export.executorch.conftest import Program, created
from tests.onnx_helpers import Wired, norm


def test_sparse_pruned_and_quantized_models_become_small_programs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 8, 3), norm(8), nn.ReLU())
    images = torch.randn(4, 3, 8, 8)
    sparse = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    pruned = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"schedule": "baseline", "prune_first_conv": True},
    }
    controller = created(model, images, pruned, sparse)
    report = controller.export(tmp_path / "model.pte", images)
    assert report.integer_share == 1
    assert sum(entry.macs for entry in report.work) < 0.7 * 4 * (64 * 16 * 27 + 36 * 8 * 144)
    (made,) = Program(tmp_path / "model.pte")(images)
    with torch.no_grad():
        expected = controller.model(images)
    assert (made - expected).abs().mean() <= 0.01 * expected.abs().mean()


class Reader(nn.Module):
    """Reads tokens and a keyword argument, and returns tensors and something else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.query, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(5), nn.Linear(5, 20)

    def forward(self, tokens, scale=None):
        x = self.embedding(tokens) * scale
        y = self.norm(self.query(x) @ x.transpose(1, 2))
        return {"scores": self.head(y), "state": (y, "text")}


def test_embeddings_and_products_of_activations_with_integers_and_keyword_arguments(tmp_path):
    tokens = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "scale": torch.ones(1)}
    controller = created(Reader(), batch)
    report = controller.export(tmp_path / "model.pte", batch, dynamic_batch=False)
    assert len(report.inputs) == len(report.outputs) == 2
    notes = " ".join(report.notes)
    assert "leaves out what is no tensor" in notes
    assert {agreement.relative_mean < 0.01 for agreement in report.agreements} == {True}
    reasons = {entry.operator: entry.reason for entry in report.work}
    assert reasons["bmm"] == "XNNPACK has no product of two activations in integers"
    assert any(entry.place == "head" and entry.is_integer for entry in report.work)


def test_a_plain_sparse_model_computes_the_same_in_float32(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    controller, _ = create_compressed_model(model.eval(), {"compression": {"algorithm": "magnitude_sparsity"}})
    x = torch.randn(4, 8, dtype=torch.float64)
    report = controller.export(tmp_path / "model.pte", x)
    assert report.worst().relative < 1e-5 and report.integer_share == 0
    assert any("computes in float32" in note and "float64" in note for note in report.notes)
    assert [parameter.dtype for parameter in controller.model.parameters()] == [torch.float64] * 4


def linear(**section):
    torch.manual_seed(0)
    return created(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(16, 8), **section)


def test_each_quantized_tensor_is_what_torch_rounds(tmp_path):
    report = linear().export(tmp_path / "model.pte", torch.randn(16, 8), by_layer=True)
    assert len(report.layers) == 3  # the input, behind the ReLU, and the output
    assert all(layer.steps <= 0.51 for layer in report.layers), report.layers


def test_a_wrong_scale_is_found_and_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")
    controller = linear()
    wrong = [handle.transform for handle in activation_transforms(controller.model)][1]
    preparing = sys.modules["compress_quantization.export.prepare"]
    made = preparing.DecomposedActivation

    def faulty(quantizer):
        module = made(quantizer)
        if torch.equal(quantizer.grid().scale, wrong.grid().scale):
            module.scale *= 2
        return module

    monkeypatch.setattr(preparing, "DecomposedActivation", faulty)
    with pytest.raises(ExportError, match=r"The first tensor that departs is quantized at '1' \(output\)") as caught:
        controller.export(path, torch.randn(16, 8))
    assert "has another grid" in str(caught.value) or "steps away" in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("root", "section", "what"),
    [
        ({"target_device": "TRIAL"}, {"weights": {"mode": "asymmetric"}}, "zero point other than 0"),
        ({"target_device": "TRIAL"}, {"activations": {"per_channel": True}}, "a scale for each channel"),
    ],
)
def test_grids_that_xnnpack_lacks_are_refused_by_name(tmp_path, root, section, what):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    with torch.no_grad():
        model[0].weight += 0.1
    document = {**root, "compression": {"algorithm": "quantization", "overflow_fix": "disable", **section}}
    x = torch.randn(4, 3, 8, 8)
    controller, _ = create_compressed_model(model.eval(), document, init_loader=[x])
    with pytest.raises(ExportError, match=rf"^quantizer '[^']+': ExecuTorch's XNNPACK has no .*{what}.*xnnpack"):
        controller.export(tmp_path / "model.pte", x)
    assert not list(tmp_path.iterdir())


def test_a_model_for_one_batch_size_says_so(tmp_path):
    torch.manual_seed(0)
    model = Wired(lambda self, x: self.layer(x).view(4, 2, 2), layer=nn.Linear(8, 4))
    controller, _ = create_compressed_model(model.eval(), {"compression": {"algorithm": "magnitude_sparsity"}})
    report = controller.export(tmp_path / "model.pte", torch.randn(4, 8))
    assert re.match("takes batches of 4 only, because the model fails on others", report.notes[0])
    assert {agreement.batch_size for agreement in report.agreements} == {4}


def test_names_of_inputs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="input_names: programs of ExecuTorch number"):
        linear().export(tmp_path / "model.pte", torch.randn(2, 8), input_names=["x"])


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    controller, find = linear(), importlib.util.find_spec
    monkeypatch.setattr(
        "compress_core.export.exporter.find_spec", lambda name: None if name == "executorch" else find(name)
    )
    with pytest.raises(ExportError, match=re.escape("pip install 'compress-core[executorch]'")):
        controller.export(tmp_path / "model.pte", torch.randn(2, 8))


def test_a_version_of_executorch_that_does_not_fit_is_said_in_a_sentence(tmp_path, monkeypatch):
    def fails(name):
        raise ImportError("cannot import name 'symbol' from 'torch'\nmore")

    monkeypatch.setattr("compress_core.export.executorch.silence.importlib.import_module", fails)
    with pytest.raises(ExportError, match=r"cannot be used with torch .*cannot import name .*1\.4 and 1\.5 for 2\.13"):
        linear().export(tmp_path / "model.pte", torch.randn(2, 8))


def test_an_operator_that_the_runtime_lacks_is_an_error_without_a_file(tmp_path):
    torch.manual_seed(0)
    model = Wired(lambda self, x: torch.relu(self.layer(x)), layer=nn.Conv3d(2, 4, 3))
    controller, _ = create_compressed_model(model.eval(), {"compression": {"algorithm": "magnitude_sparsity"}})
    with pytest.raises(ExportError, match=r"cannot run what was exported .*3-D or 4-D"):
        controller.export(tmp_path / "model.pte", torch.randn(2, 2, 5, 5, 5))
    assert not list(tmp_path.iterdir())
