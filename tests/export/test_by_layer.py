"""The comparison of each quantized tensor, as figures and as a picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export import ExportReport, LayerAgreement, draw_layers
from compress_core.export.onnx import verification
from tests.onnx_helpers import create
from tests.zoo import images

PLACES = ["'the model' (input_0)", "'1' (output)", "'3' (output)"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def report(request, tmp_path_factory):
    pytest.importorskip(request.param)
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    return create(net()).export(path, images(4), target=request.param, by_layer=True)


def test_a_right_file_rounds_by_half_a_step_and_accumulates_less(report):
    assert [layer.place for layer in report.layers] == PLACES
    for layer in report.layers:
        assert 0.4 < layer.steps < 0.6, "the largest rounding of many values is half a step"
        assert layer.accumulated < 0.05


def test_without_asking_nothing_is_compared_by_layer(tmp_path):
    assert create(net()).export(tmp_path / "model.onnx", images(4)).layers == ()


def test_the_error_carries_what_was_measured_and_where_it_begins(tmp_path, monkeypatch):
    def double_a_scale(graph):
        import onnx_ir

        name, value = next((n, v) for n, v in graph.graph.initializers.items() if n.endswith("2.weight.scale"))
        value.const_value = onnx_ir.tensor(2 * value.const_value.numpy(), name=name)

    controller = create(net())
    rewrite = controller._lifecycle.export
    monkeypatch.setattr(controller._lifecycle, "export", lambda *args: [*rewrite(*args), double_a_scale])
    with pytest.raises(ExportError, match=r"The first tensor that departs is quantized at '3' \(output\)") as caught:
        controller.export(tmp_path / "model.onnx", images(8))
    layers = caught.value.report.layers
    assert [layer.steps > 0.75 for layer in layers] == [False, False, True]
    assert layers[2].accumulated > 1
    draw_layers(caught.value.report, tmp_path / "error.svg")
    text = (tmp_path / "error.svg").read_text()
    assert "#d62728" in text, "the layer that departs is red"
    assert [path.name for path in tmp_path.iterdir()] == ["error.svg"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_picture_is_written_in_the_format_of_its_name(report, ending, tmp_path):
    path = tmp_path / f"layers.{ending}"
    draw_layers(report, path)
    beginnings = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(beginnings[ending])


def test_what_cannot_be_drawn_is_said(report, tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.png, \.svg, \.pdf"):
        draw_layers(report, tmp_path / "layers.jpg")
    with pytest.raises(UsageError, match="export with by_layer=True"):
        draw_layers(ExportReport(), tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("accumulated", "place"),
    [
        ([0.0, 0.01, 0.1, 0.4, 1.5, 4.0], None),  # roundings that a network amplifies
        ([0.0, 5.5, 0.0, 9.0], "1"),  # a layer that the runtime computes in another way in the whole graph
        ([0.0, 0.2, None, 3.0, 70.0], "4"),
        ([0.0, 0.9], None),
        ([], None),
    ],
)
def test_a_jump_is_told_from_roundings_that_add_up(accumulated, place):
    layers = [LayerAgreement(str(number), 0.5, steps) for number, steps in enumerate(accumulated)]
    found = verification._jump(layers)
    assert (None if found is None else found.place) == place


def test_a_file_that_is_right_in_parts_only_is_refused(tmp_path, monkeypatch):
    controller = create(net())
    monkeypatch.setattr(verification, "_jump", lambda layers: layers[1])
    monkeypatch.setattr(verification, "_LAST_LAYERS", 1.0)
    monkeypatch.setattr("compress_core.export.onnx.exporter._TOLERANCE", 0.0)
    with pytest.raises(ExportError, match=r"in the whole file the one at '1' \(output\) is .* steps away in the mean"):
        controller.export(tmp_path / "model.onnx", images(8))
    assert not list(tmp_path.iterdir())
