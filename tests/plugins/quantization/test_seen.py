"""What a report says of quantizers, computed a second time with numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.pages import Bars, Text
from compress_core.transforms import raw_parameter
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.precision.report import FrontierPoint, PrecisionReport
from compress_quantization.seen import SAMPLES, SeenValues

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(3)) * 2


def by_numpy(module, x):
    """Share of the values whose nearest grid value is an end of the grid, and more than half a step away."""
    low, high = (end.double().numpy() for end in module.range())
    smallest, largest = module.levels()
    half = (high - low) / (largest - smallest) / 2
    values = x.double().numpy()
    return float(((values < low - half) | (values > high + half)).mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (1, 6)], ids=["tensor", "channels"])
@pytest.mark.parametrize("kind", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
def test_the_clipped_share(kind, shape, bits):
    module = kind(shape, bits=bits, **({"signed": True} if kind is SymmetricFakeQuantize else {}))
    module.signed = True
    scale = torch.linspace(0.5, 3, shape[-1]).reshape(shape) if shape[-1] > 1 else torch.ones(shape)
    module.set_range(-scale, scale)
    seen = SeenValues(module)
    for part in X.split(30):
        seen.update(part)
    assert seen.total == X.numel()
    assert seen.clipped / seen.total == pytest.approx(by_numpy(module, X), abs=2 / X.numel())
    assert (seen.low, seen.high) == (float(X.min()), float(X.max()))
    low, high = (end.numpy() for end in module.range())
    inside = ((X.numpy() >= low) & (X.numpy() <= high)).sum()
    assert int(seen.counts[6:-6].sum()) == pytest.approx(inside, abs=1)


def test_values_that_are_no_numbers_are_left_out():
    seen = SeenValues(SymmetricFakeQuantize((1,)))
    seen.update(torch.tensor([1, 2]))
    seen.update(torch.empty(0))
    assert not seen.has_seen_values
    seen.update(torch.tensor([0.5, float("nan"), float("inf"), -0.25], dtype=torch.float16))
    assert (seen.total, seen.clipped, seen.low, seen.high) == (2, 1, -0.25, 0.5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def created(loader):
    config = {"compression": {"algorithm": "quantization"}, "input_info": {"sample_size": [1, 6]}}
    return create_compressed_model(Net(), config, init_loader=loader)[0]


def report_of(controller):
    return controller._lifecycle.report(controller.model)["quantization"]


def test_activations_are_those_of_the_calibration_data():
    batches = list(X.split(16))
    controller = created(batches)
    name = next(name for name in controller.non_weight_quantizers if "input" in name)
    table = next(block for block in report_of(controller) if isinstance(block, Bars))
    row = next(row for row in table.rows if row[0] == name)
    seen = X[:SAMPLES]
    assert row[3] == f"{seen.min():.3g} to {seen.max():.3g}"
    assert row[4] == pytest.approx(by_numpy(controller.non_weight_quantizers[name], seen), abs=1e-3)
    assert f"{seen.numel()} values" in row[5].description
    weight = next(row for row in table.rows if row[0].endswith("a|WEIGHT"))
    assert weight[4] == 0
    raw = raw_parameter(controller.model.a, "weight")
    assert weight[3] == f"{raw.min():.3g} to {raw.max():.3g}"


def test_an_iterator_is_not_read():
    controller = created(iter(list(X.split(16))))
    blocks = report_of(controller)
    assert any(isinstance(block, Text) and "an iterator can be read once" in block.text for block in blocks)
    table = next(block for block in blocks if isinstance(block, Bars))
    assert {row[0] for row in table.rows} == set(controller.weight_quantizers)


def test_a_quantizer_that_is_off_is_left_out():
    controller = created(list(X.split(16)))
    controller.disable_activation_quantization()
    table = next(block for block in report_of(controller) if isinstance(block, Bars))
    assert {row[0] for row in table.rows} == set(controller.weight_quantizers)


def test_the_frontier_is_drawn(monkeypatch):
    points = (FrontierPoint(4, 4, 0.3, 0.2), FrontierPoint(8, 8, 0.1, 0.1, True))
    report = PrecisionReport("sensitivity", "bits", "error of the output", 8, points, {"a": {4: 0.1, 8: 0.2}})
    kinds = [block.kind for block in report.blocks()]
    assert kinds == ["picture", "grid", "grid"]
    monkeypatch.setattr("compress_quantization.precision.report.has_matplotlib", lambda: False)
    first = report.blocks()[0]
    assert "pip install 'compress-core[report]'" in first.text
    assert [block.kind for block in PrecisionReport("m", "u", "e", 1).blocks()] == []


def test_bits_by_layer():
    controller = created(list(X.split(16)))
    (column,) = controller.statistics().quantization.by_layer()
    assert dict(column.values) == {"a.weight": 8, "b.weight": 8}
    assert np.unique([q.bits for q in controller.weight_quantizers.values()]).tolist() == [8]
