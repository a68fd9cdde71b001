"""Exports of models that compute in bfloat16, float16 or float64: their files compute in float32, and say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.onnx_helpers import File, Wired, create

pytestmark = pytest.mark.usefixtures("fast_exporter")

# Rounding of a value to each type, and that of float32.
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-24}


def network(dtype=None):
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 3)}

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(x)))
        return self.last(hidden).mean((2, 3)).float().softmax(-1).to(hidden.dtype)

    return Wired(forward, **layers).to(dtype)


@pytest.mark.parametrize("dtype", _ROUNDING)
@pytest.mark.parametrize("algorithm", ["magnitude_sparsity", "quantization"])
def test_the_file_computes_in_float32(algorithm, dtype, tmp_path):
    x = torch.randn(4, 3, 8, 8).to(dtype)
    controller = create(network(dtype), [x], algorithm=algorithm)
    report = controller.export_onnx(tmp_path / "model.onnx", x)
    name = str(dtype).removeprefix("torch.")
    assert report.notes == (f"computes in float32, inputs and outputs included, where the model computes in {name}",)
    file = File(tmp_path / "model.onnx")
    assert {array.dtype for array in file.constants.values()} <= set(map(np.dtype, ("f4", "i1", "i4", "u1", "i8")))
    expected = controller.model(x).detach().double().numpy()
    (actual,) = file.run(x.float())
    assert np.abs(actual - expected).max() < 8 * _ROUNDING[dtype] + (5e-3 if algorithm == "quantization" else 1e-6)
    if algorithm == "quantization":
        assert report.runtime_operators["QLinearConv"] == 2  # no cast stands between a quantizer and its layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_forward(exported, dtype):
    inner = network()

    def forward(self, x):
        with torch.autocast("cpu", dtype):
            return self.inner(x)

    x = torch.randn(4, 3, 8, 8)
    report, file = exported(Wired(forward, inner=inner), x)
    assert "computes in float32" in report.notes[0]
    assert report.operators["Cast"] == 1  # of the output
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = inner(x).float().numpy()
    assert np.abs(file.run(x)[0] - expected).max() < 4 * _ROUNDING[dtype]


def test_dtypes_of_single_layers_and_inputs(exported):
    torch.manual_seed(0)
    model = Wired(lambda self, x, y: self.a(x) + self.b(y).float(), a=nn.Linear(8, 4), b=nn.Linear(8, 4).bfloat16())
    inputs = torch.randn(4, 8), torch.randn(4, 8).bfloat16()
    report, file = exported(model, inputs)
    assert "bfloat16" in report.notes[0]
    np.testing.assert_allclose(
        file.run(inputs[0], inputs[1].float())[0], model(*inputs).detach().numpy(), rtol=0, atol=0.02
    )


def test_double_values_among_float32_weights_stay(exported):
    torch.manual_seed(0)
    model = Wired(
        lambda self, x: self.layer(x).double() * torch.tensor(1e300, dtype=torch.float64), layer=nn.Linear(8, 4)
    )
    x = torch.randn(4, 8)
    report, file = exported(model, x)
    assert not report.notes
    np.testing.assert_allclose(file.run(x)[0], model(x).detach().numpy(), rtol=1e-4)


def test_integer_constants_stay_integers(exported):
    torch.manual_seed(0)
    model = Wired(lambda self, x: self.layer(x) @ (self.table.float() * 0.1), layer=nn.Linear(8, 4))
    model.register_buffer("table", torch.randint(-5, 5, (4, 4), dtype=torch.int8))
    x = torch.randn(4, 8)
    report, file = exported(model, x)
    assert not report.notes
    np.testing.assert_allclose(file.run(x)[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-6)
