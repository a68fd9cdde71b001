"""The error of outputs that searches for numbers of bits keep small."""

from __future__ import annotations

import json

import pytest
import torch

from compress_quantization.precision.outputs import MeanError, kind_of_error
from tests.plugins.quantization.precision.search_helpers import Net, created, make_net, pairs

MEASURED = {
    "sensitivity": {"type": "sensitivity", "budget": {"average_bits": 4}, "frontier_points": 0},
    "autoq": {"type": "autoq", "iter_number": 3},
    "hawq": {"type": "hawq", "iter_number": 8, "budget": {"average_bits": 4}, "output_error": "squared"},
}


class TwoOutputs(Net):
    """Scores, and the same numbers in another unit, as boxes in pixels are."""

    unit = 1.0

    def forward(self, x):
        scores = super().forward(x)
        return {"scores": scores, "boxes": self.unit * scores.flip(0).square()}


def of_unit(unit):
    model = TwoOutputs()
    model.load_state_dict(make_net().state_dict())
    model.unit = unit
    return model


def measured(method, unit, folder):
    """Returns what was measured of each weight, whatever the method calls it."""
    folder.mkdir()
    created({**MEASURED[method], "dump_init_precision_data": True, "dump_path": str(folder)}, of_unit(unit))
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [number for content in files for number in numbers(content)]


def numbers(value):
    if isinstance(value, dict):
        return [n for entry in value.values() for n in numbers(entry)]
    if isinstance(value, list):
        return [n for entry in value for n in numbers(entry)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("unit", [1e-4, 1e4])
@pytest.mark.parametrize("method", MEASURED)
def test_the_unit_of_an_output_changes_nothing(method, unit, tmp_path):
    plain = measured(method, 1.0, tmp_path / "plain")
    assert len(plain) > 4
    assert measured(method, unit, tmp_path / "scaled") == pytest.approx(plain, rel=2e-3)


def test_the_error_is_the_mean_of_those_of_the_outputs():
    torch.manual_seed(0)
    batches = [([torch.randn(n, 3), 100 * torch.randn(n, 4, 5)], n) for n in (2, 5)]
    error, squares, scales = MeanError("squared"), [0.0, 0.0], [0.0, 0.0]
    for reference, _ in batches:
        changed = [tensor + 0.1 * torch.randn_like(tensor) for tensor in reference]
        error.update(reference, changed)
        for place, (ref, out) in enumerate(zip(reference, changed, strict=True)):
            squares[place] += float((out.double() - ref.double()).square().sum())
            scales[place] += float(ref.double().square().sum())
    assert error.value() == pytest.approx((squares[0] / scales[0] + squares[1] / scales[1]) / 2, rel=1e-6)


def test_an_output_of_zeros_counts_by_its_change():
    error, zeros = MeanError("squared"), torch.zeros(2, 3)
    error.update([zeros], [zeros])
    assert error.value() == 0
    error.update([zeros], [zeros + 2])
    assert error.value() > 0


def test_confident_samples_count_as_others_do():
    """A network is sure of what it was trained on: there the divergence hardly sees an error."""
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    errors = {}
    for kind in ("squared", "kl"):
        errors[kind] = MeanError(kind)
        errors[kind].update([logits], [logits + torch.tensor([[0.0, 3.0, 0.0]])])
    assert errors["kl"].value() < 1e-9
    assert errors["squared"].value() == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(4, 10), (4, 10, 6), (4, 1), (4,)])
def test_what_auto_stands_for(shape):
    tensors = [torch.zeros(shape)]
    assert kind_of_error("auto", tensors, "here") == "squared"
    assert kind_of_error("auto", tensors, "here", auto="kl") == ("kl" if shape == (4, 10) else "squared")


def test_sensitivity_says_which_error_it_measured():
    controller, _ = created(MEASURED["sensitivity"], make_net(), pairs())
    assert controller.precision_report.error.startswith("mean square")
