"""The error of outputs that searches for numbers of bits keep small."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from compress_core import CompressionError
from compress_quantization.precision.outputs import MeanError, kind_of_error
from tests.plugins.quantization.precision.search_helpers import Net, created, make_net, pairs, weight_bits

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


# Squares of numbers of 1e-25 are zero in float32, and those of 1e25 infinite.
@pytest.mark.parametrize("unit", [1e-30, 1e-4, 1e4, 1e25])
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


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-35), (torch.float32, 1e35), (torch.float64, 1e-200)])
def test_the_error_of_outputs_of_any_magnitude(dtype, unit):
    torch.manual_seed(0)
    error, plain = MeanError("squared"), MeanError("squared")
    for size in (1e-3, 1.0, 0.1):  # batches of different magnitudes
        reference = size * torch.randn(4, 3, dtype=torch.float64)
        changed = reference + 0.1 * size * torch.randn(4, 3, dtype=torch.float64)
        error.update([(reference * unit).to(dtype)], [(changed * unit).to(dtype)])
        plain.update([reference], [changed])
    assert plain.value() == pytest.approx(0.01, rel=0.9)
    assert error.value() == pytest.approx(plain.value(), rel=1e-5)


def test_small_divergences_are_not_rounding():
    torch.manual_seed(0)
    reference = 5 * torch.randn(50, 100)
    changed = reference + 1e-4 * torch.randn(50, 100)
    error = MeanError("kl")
    error.update([reference], [changed])
    p, q = (np.exp(t.numpy().astype(np.float64)) for t in (reference, changed))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert error.value() == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)


def test_an_output_that_is_not_finite_is_no_error_of_a_number():
    error, zeros = MeanError("squared"), torch.zeros(2, 3)
    error.update([zeros], [zeros + math.inf])
    error.update([zeros + 1e30], [zeros])
    assert error.value() == math.inf


class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()


def test_hawq_refuses_outputs_without_derivatives():
    with pytest.raises(CompressionError, match="no output of the model has a graph"):
        created(MEASURED["hawq"], Detached())


class Silent(Net):
    """A network whose branch `right` has no effect on the output."""

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc(self.left(x).relu().mean((2, 3))) + 0 * self.right(self.left(x).new_ones(1, 6, 1, 1)).sum()


@pytest.mark.parametrize("method", MEASURED)
def test_weights_without_an_effect_are_named(method, caplog):
    controller, _ = created(MEASURED[method], Silent())
    assert "the error of the output does not depend on 1 of the weights, such as 'right|WEIGHT'" in caplog.text
    assert weight_bits(controller)["stem|WEIGHT"] > 2


class Growing(Net):
    """Boxes for all samples but the first batch have a second output."""

    def forward(self, x):
        scores = super().forward(x)
        return [scores] if len(x) == 24 else [scores, scores]


@pytest.mark.parametrize("method", MEASURED)
def test_another_number_of_outputs_in_a_later_batch_is_refused(method):
    with pytest.raises(CompressionError, match="1 floating-point tensors for one batch and 2 for another"):
        created(MEASURED[method], Growing(), [*pairs(1), *pairs(1, size=8)])


class FirstIsSmall(TwoOutputs):
    """An output that is next to zero on the first batch."""

    def forward(self, x):
        found = super().forward(x)
        return found | {"boxes": found["boxes"] * (1e-6 if x.mean() > 100 else 1.0)}


def test_scales_of_outputs_are_those_of_all_batches(tmp_path):
    """With a scale from the first batch alone, an output that is small there would outweigh all others."""
    batches = pairs(3)
    first = [(batches[0][0] + 1000, batches[0][1]), *batches]
    last = [*batches, first[0]]
    bits = []
    for loader in (first, last):
        folder = tmp_path / str(len(bits))
        model = FirstIsSmall()
        model.load_state_dict(make_net().state_dict())
        precision = {**MEASURED["hawq"], "num_data_points": 96, "iter_number": 100}
        created({**precision, "dump_init_precision_data": True, "dump_path": str(folder)}, model, loader)
        bits.append(json.loads((folder / "traces.json").read_text()))
    assert bits[0] == pytest.approx(bits[1], rel=0.5)
