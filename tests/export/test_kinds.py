"""Exports of models made for one sample, with shared weights, of mixed types, and with operators that ONNX lacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ExportError
from compress_core.export.agreement import DisagreementError, compared
from tests.onnx_helpers import File, Wired, create

pytestmark = pytest.mark.usefixtures("fast_exporter")


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda y: y.view(1, 512), id="numbers"),
        pytest.param(lambda y: y.view(1, -1), id="the rest"),
        pytest.param(lambda y: F.pad(y.mean((2, 3)).squeeze(0), (0, 504)), id="squeeze"),
    ],
)
def test_models_made_for_one_sample(tmp_path, forward):
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 8, 3, padding=1), "head": nn.Linear(512, 4)}
    x = torch.randn(1, 3, 8, 8)
    controller = create(Wired(lambda self, x: self.head(forward(torch.relu(self.conv(x)))), **layers), [x] * 4)
    report = controller.export_onnx(tmp_path / "model.onnx", x)
    assert report.notes[0].startswith("takes batches of 1 only, because")
    with torch.no_grad():
        expected = controller.model(x).numpy()
    assert np.abs(File(tmp_path / "model.onnx").run(x)[0] - expected).max() < 0.01


class Tied(nn.Module):
    """A language model: its head has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.relu(self.layer(self.embedding(ids))))


def test_tied_weights_are_stored_once(tmp_path):
    ids = torch.randint(0, 50, (4, 6))
    controller = create(Tied(), [ids])
    report = controller.export_onnx(tmp_path / "model.onnx", ids)
    file = File(tmp_path / "model.onnx")
    assert sorted(array.size for array in file.constants.values() if array.ndim == 2) == [256, 800]
    assert report.runtime_operators["MatMulIntegerToFloat"] == 2  # the transposed one as well
    assert [entry.size for entry in report.zeros] == [800, 256]
    with torch.no_grad():
        expected = controller.model(ids).numpy()
    assert np.abs(file.run(ids)[0] - expected).max() < 1e-3


def test_a_layer_with_two_calls_and_a_shared_weight(tmp_path):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}
    layers["b"].weight = layers["a"].weight
    x = torch.randn(4, 16)
    controller = create(Wired(lambda self, x: self.b(torch.relu(self.a(torch.relu(self.a(x))))), **layers), [x])
    controller.export_onnx(tmp_path / "model.onnx", x)
    assert [a.shape for a in File(tmp_path / "model.onnx").constants.values() if a.ndim == 2] == [(16, 16)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mixed_types(tmp_path, dtype):
    """Half inputs, a layer of another type, and a float64 buffer, through a layer norm and an LSTM."""
    torch.manual_seed(0)
    layers = {"norm": nn.LayerNorm(8), "lstm": nn.LSTM(8, 8, batch_first=True).to(dtype), "head": nn.Linear(8, 4)}

    def forward(self, x):
        hidden = self.lstm(self.norm(x.float()).to(dtype))[0].float()
        return self.head(hidden).double() * self.scale

    model = Wired(forward, **layers)
    model.register_buffer("scale", torch.rand(4, dtype=torch.float64))
    x = torch.randn(4, 5, 8).to(dtype)
    controller = create(model, [x])
    report = controller.export_onnx(tmp_path / "model.onnx", x)
    assert str(dtype).removeprefix("torch.") in report.notes[0]
    assert report.worst().relative_mean < 0.03


def test_nan_in_torch_is_said(exported):
    model = Wired(lambda self, x: torch.log(self.layer(x).abs() * torch.tensor([1.0, -1])), layer=nn.Linear(8, 2))
    report, _ = exported(model, torch.randn(4, 8))
    assert report.notes == ("returns NaN, as torch does: 4 of 8 values of output 0 on the example",)


def test_nan_in_the_runtime_alone_is_an_error():
    expected, actual = torch.ones(2, 3), np.ones((2, 3))
    actual[0, 1] = np.nan
    with pytest.raises(DisagreementError, match="output 'y' is NaN in the runtime in 1 of 6 values"):
        compared(["y"], [actual], [expected], 2, True)


def test_operators_that_onnx_lacks_are_named_with_their_place(exported):
    inner = Wired(lambda self, x: torch.special.bessel_j0(self.layer(x)), layer=nn.Linear(8, 4))
    model = Wired(lambda self, x: self.inner(x), inner=inner)
    with pytest.raises(ExportError, match=r"operator prims.bessel_j0 in 'inner' \(Wired\), called at \w+\.py:\d+"):
        exported(model, torch.randn(4, 8))


def test_branches_on_values_are_named_with_their_line(exported):
    model = Wired(lambda self, x: self.layer(x) if x.sum() > 0 else x, layer=nn.Linear(8, 8))
    with pytest.raises(ExportError, match=r"data-dependent .*\(in test_kinds\.py, line \d+\)"):
        exported(model, torch.randn(4, 8))
