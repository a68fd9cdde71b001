"""What a runtime executes in integers, read from its own profile and counted in multiplications."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from tests.onnx_helpers import Wired, create
from tests.zoo import images

pytest.importorskip("openvino")


def net():
    """Layers of known sizes; `float` has no quantizer at its output, and nothing of `free` is quantized."""
    torch.manual_seed(0)

    def forward(m, x):
        x = torch.relu(m.first(x))
        x = torch.relu(m.wide(x))
        x = nn.functional.silu(m.open(x))
        return m.head(m.free(x).mean((2, 3)))

    layers = {
        "first": nn.Conv2d(3, 8, 3, padding=1),
        "wide": nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2),
        "open": nn.Conv2d(16, 16, 1),
        "free": nn.Conv2d(16, 8, 1, bias=False),
        "head": nn.Linear(8, 10),
    }
    return Wired(forward, **layers)


# Multiplications of one image of 8 x 8, by hand: positions x filters x inputs of a filter.
BY_HAND = {
    "first": 8 * 8 * 8 * 3 * 9,
    "wide": 4 * 4 * 16 * 4 * 9,
    "open": 4 * 4 * 16 * 16,
    "free": 4 * 4 * 8 * 16,
    "head": 10 * 8,
}


@pytest.fixture(scope="module")
def controller():
    return create(net(), [images(8)], ignored_scopes=["free"])


def plain(model):
    return create_compressed_model(model.eval(), {"compression": []})[0]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def exported(request, controller, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    return request.param, controller.export(path, images(4), target=request.param)


def test_multiplications_are_those_counted_by_hand(exported):
    _, report = exported
    assert {entry.place: entry.macs for entry in report.work} == {name: 4 * count for name, count in BY_HAND.items()}


def test_the_runtime_says_which_layers_it_computes_in_integers(exported):
    runtime, report = exported
    in_float = {entry.place for entry in report.work if not entry.is_integer}
    # ONNX Runtime computes a convolution in integers only if its output is quantized; OpenVINO fuses what follows.
    assert in_float == ({"open", "free"} if runtime == "onnxruntime" else {"free"})
    expected = 1 - sum(BY_HAND[name] for name in in_float) / sum(BY_HAND.values())
    assert report.integer_share == pytest.approx(expected)


def test_reasons_name_what_is_missing(exported):
    runtime, report = exported
    reasons = {entry.place: entry.reason for entry in report.work if not entry.is_integer}
    assert reasons["free"] == "its input and its weight are not quantized"
    if runtime == "onnxruntime":
        assert reasons["open"] == "its output is not quantized"


def test_a_large_quantized_layer_in_float_is_a_warning_with_the_remedy(controller, tmp_path, caplog):
    report = controller.export(tmp_path / "model.onnx", images(4))
    (note,) = report.notes
    assert "'open' (14% of the multiplications) because its output is not quantized" in note
    assert note.endswith('"target_device": "onnxruntime-cpu" places quantizers for it')
    assert "'free'" not in note, "what the user has ignored is no surprise"
    assert note in caplog.text


def test_the_report_shows_it(exported):
    _, report = exported
    text = report.to_str()
    millions = 4 * sum(BY_HAND.values()) / 1e6
    assert f"{report.integer_share:.1%} of {millions:.4g} million multiplications run in integers" in text
    assert "its input and its weight are not quantized" in text


def test_float_models_have_no_integers_and_no_warning(tmp_path):
    report = plain(net()).export(tmp_path / "model.onnx", images(2))
    assert report.integer_share == 0 and not report.notes


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_activations_and_recurrent_layers_are_counted(transposed, tmp_path):
    def forward(m, x):
        y, _ = m.lstm(x)
        return m.up((y @ y.mT if not transposed else y.mT @ y).unsqueeze(1))

    model = Wired(forward, lstm=nn.LSTM(5, 6, batch_first=True), up=nn.ConvTranspose2d(1, 2, 3, stride=2))
    report = plain(model).export(tmp_path / "model.onnx", torch.randn(2, 7, 5))
    found = {entry.operator: entry.macs for entry in report.work}
    side, inner = (6, 7) if transposed else (7, 6)
    assert found == {
        "LSTM": 2 * 7 * 4 * 6 * (5 + 6),
        "MatMul": 2 * side * side * inner,
        "ConvTranspose": 2 * side**2 * 2 * 9,
    }
