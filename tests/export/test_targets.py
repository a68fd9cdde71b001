"""Choosing the runtime: by name, by `target_device`, by the ending of the file; OpenVINO's files."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export import OnnxExporter
from compress_core.export.exporter import chosen_target
from compress_core.export.runtimes import runtime as runtime_module
from tests.onnx_helpers import create
from tests.zoo import images


def small():
    torch.manual_seed(0)
    return create(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)))


@pytest.fixture(scope="module")
def controller():
    return small()


@pytest.fixture(scope="module")
def exporters():
    from compress_core.contract.choices import choices_of

    return {name: choice.value for name, choice in choices_of("export.target").items()}


@pytest.mark.parametrize(
    ("name", "file", "device", "expected"),
    [
        (None, "m.onnx", "ANY", "onnxruntime"),
        (None, "m.onnx", "CPU", "onnxruntime"),
        (None, "m.onnx", "openvino-cpu", "openvino"),
        (None, "m.onnx", "tensorrt", "tensorrt"),
        (None, "m.xml", "ANY", "openvino"),
        (None, "M.XML", "tensorrt", "openvino"),
        ("openvino", "m.onnx", "ANY", "openvino"),
        (None, "m.onnx", "xnnpack", "onnxruntime"),
        (None, "m.onnx", "NPU", "openvino"),
        (None, "m.pte", "tensorrt", "executorch"),
    ],
)
def test_which_runtime_a_file_is_written_for(name, file, device, expected, exporters, tmp_path):
    assert chosen_target(exporters, name, tmp_path / file, device) == expected


def test_a_plugin_that_adds_a_runtime_does_not_change_the_default(exporters, tmp_path):
    class Another(OnnxExporter):
        devices = ("CPU", "another")

    installed = {"another": Another(), **exporters}
    assert chosen_target(installed, None, tmp_path / "m.onnx", "CPU") == "onnxruntime"
    assert chosen_target(installed, None, tmp_path / "m.onnx", "another") == "another"


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("onnx", "m.onnx", "target: there is no 'onnx'; choose one of executorch, onnxruntime, openvino, tensorrt"),
        ("tensorrt", "m.xml", r"for target 'tensorrt', files end in \.onnx"),
        (None, "m.trt", r"does not end in \.onnx, \.pte, \.xml; choose the runtime with target="),
    ],
)
def test_what_cannot_be_chosen_is_said(name, file, message, controller, tmp_path):
    with pytest.raises(UsageError, match=message):
        controller.export(tmp_path / file, images(4), target=name)
    assert not list(tmp_path.iterdir())


def test_options_of_onnx_are_refused_for_other_formats():
    class Other(OnnxExporter):
        target = OnnxExporter.__base__.target

    from compress_core.export import Options

    with pytest.raises(UsageError, match="opset: 21: only ONNX files have one; leave it out for target 'other'"):
        Other().target("other", Options(opset=21))


def test_ir_computes_what_torch_computes(controller, tmp_path):
    report = controller.export(tmp_path / "model.xml", images(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    model = openvino.Core().compile_model(str(tmp_path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = images(5)
    with torch.no_grad():
        expected = controller.model(x).numpy()
    np.testing.assert_allclose(model(x.numpy())[0], expected, atol=0.02 * np.abs(expected).max())
    assert {agreement.batch_size for agreement in report.agreements} == {4, 1}


def test_a_write_that_fails_leaves_the_old_pair(controller, tmp_path, monkeypatch):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes(b"precious")
    monkeypatch.setattr(openvino, "save_model", lambda *args, **options: 1 / 0)
    with pytest.raises(ExportError, match="OpenVINO cannot convert the model to IR: division by zero"):
        controller.export(tmp_path / "model.xml", images(4))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"precious"] * 2


def test_a_missing_runtime_is_named_with_the_command_that_installs_it(controller, tmp_path, monkeypatch):
    from compress_core.export import exporter

    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(
        ExportError, match=r"OpenVINO: the export needs openvino: pip install 'compress-core\[openvino\]'"
    ):
        controller.export(tmp_path / "model.xml", images(4))


def test_runtimes_check_that_they_are_installed(exporters, monkeypatch):
    monkeypatch.setattr(runtime_module, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"ONNX Runtime is not installed: pip install 'compress-core\[onnx\]'"):
        exporters["onnxruntime"].runtime.check_installed()


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_models_for_other_hardware_are_not_compared_with_kernels_of_the_cpu(device, tmp_path):
    torch.manual_seed(0)
    # Weights of 8 bits on inputs of 8 bits: where the processor has no VNNI, integer kernels of the CPU saturate.
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    controller = create(layers, root={"target_device": device})
    report = controller.export(tmp_path / "model.onnx", images(4), target="openvino")
    assert {agreement.optimized for agreement in report.agreements} == {False}
    assert report.worst().relative_mean < 0.02
    assert (
        f"was run on the CPU without integer kernels, because it is made for target_device '{device}'" in report.notes
    )


def test_an_operator_that_the_runtime_lacks_is_named_with_its_module_and_the_remedy(tmp_path):
    class Bits(nn.Module):
        def forward(self, x):
            return torch.det(x)  # ONNX's Det: OpenVINO has no such operator

    torch.manual_seed(0)
    controller = create(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Bits()), [torch.randn(8, 4, 4)])
    with pytest.raises(ExportError, match=r"OpenVINO .* cannot load what was exported") as caught:
        controller.export(tmp_path / "model.onnx", torch.randn(4, 4, 4), target="openvino")
    assert "The operator Det, from '2', is what it does not take here" in str(caught.value)
    assert "name the module in ignored_scopes" in str(caught.value)
    assert not list(tmp_path.iterdir())
