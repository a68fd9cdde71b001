"""Moments of the model as it is: for choosing what goes."""

import pytest
import torch
from torch import nn

from compress_core import ModelError, mask_weight
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_weight_reconstruction.evidence import observe
from tests.plugins.weight_reconstruction.helpers import ConvNet, batches, seeded


def seen(model, names, data, positions=10_000):
    found = observe(model, names, CalibrationData(InitArgs(data), "here"), num_samples=64, positions=positions)
    assert found.samples == 64
    return found


def test_moments_are_those_of_the_layers_inputs():
    model, data = seeded(ConvNet), batches(3, 8, 8)
    found = seen(model, ["stem.weight", "fc.weight"], data)
    (stem,) = found.evidence["stem.weight"]
    x = torch.cat(data[:4]).double()
    rows = nn.functional.unfold(x, 3, padding=1).movedim(1, 2).reshape(-1, 27)
    rows = rows - rows.mean(0)
    torch.testing.assert_close(stem.normal.gram[0].double(), rows.T @ rows / len(rows))
    # The targets are the layer's own outputs, so the weight explains all of them.
    torch.testing.assert_close(stem.normal.cross, stem.weight @ stem.normal.gram, rtol=1e-4, atol=1e-5)
    norm = model.norm
    torch.testing.assert_close(stem.scale, norm.weight.detach() / (norm.running_var + norm.eps).sqrt())
    assert torch.equal(stem.as_weight(stem.as_matrices(model.stem.weight)), model.stem.weight)
    assert found.evidence["fc.weight"][0].scale is None


def test_the_model_computes_without_transforms_and_is_left_as_it_is():
    model, data = seeded(ConvNet).train(), batches(3, 8, 8)
    plain = seen(model, ["conv2.weight"], data).evidence["conv2.weight"][0]
    transform = mask_weight(model, "stem.weight", key="mine")
    transform.mask.zero_()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    masked = seen(model, ["conv2.weight"], data).evidence["conv2.weight"][0]
    assert torch.equal(plain.normal.gram, masked.normal.gram)
    assert plain.normal.gram.shape == (2, 36, 36)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and model.training and model.norm.training


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.squared = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.twice.weight
        self.added = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        y = self.tied(self.twice(self.twice(x))) + self.squared(x)
        return torch.addmm(x, y, self.added) * self.squared.weight.square().mean()


def test_calls_are_pooled_and_what_is_not_known_has_a_reason():
    model, data = seeded(Odd), batches(6)
    names = ["twice.weight", "never.weight", "squared.weight", "tied.weight", "added"]
    found = seen(model, names, data)
    assert found.missing == {
        "never.weight": "no product with it was seen on the data",
        "squared.weight": found.missing["squared.weight"],
    }
    assert "square" in found.missing["squared.weight"]
    (twice,), (tied,), (added,) = (found.evidence[name] for name in ("twice.weight", "tied.weight", "added"))
    assert twice.normal.count == 3 * 64 and torch.equal(twice.normal.gram, tied.normal.gram)
    assert (twice.name, tied.name) == ("twice.weight", "tied.weight")
    # What is added by addmm is no part of what the weight has made.
    torch.testing.assert_close(added.normal.cross, added.weight @ added.normal.gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 7])
def test_a_convolution_is_seen_at_so_many_positions(positions):
    model, data = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1))), batches(3, 8, 8)
    (evidence,) = seen(model, ["0.weight"], data, positions).evidence["0.weight"]
    assert evidence.normal.count == positions * 64


def test_inputs_that_do_not_vary_say_nothing_about_what_a_bias_makes_up_for():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)))
    found = seen(model, ["0.weight", "1.weight"], [torch.full((64, 6), 0.1)])
    assert "were the same at all positions" in found.missing["0.weight"]
    # Without a bias that takes up the mean, the mean itself counts.
    assert list(found.evidence) == ["1.weight"]


def test_a_weight_that_is_not_finite_is_named():
    model = seeded(ConvNet)
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^here: the weight 'fc\.weight' holds NaN or infinity; repair it"):
        seen(model, ["stem.weight", "fc.weight"], batches(3, 8, 8))


def test_products_of_different_kinds_are_seen_though_no_system_holds_for_all():
    model, data = seeded(lambda: Turned(6)), batches(6)
    found = seen(model, ["weight"], data)
    assert found.missing == {"weight": "its products are of different kinds"} and not found.uncounted
    straight, turned = found.products["weight"]
    assert (straight.use.columns_first, turned.use.columns_first) == (False, True)
    assert straight.normal.count == turned.normal.count == 64 and straight.uses == turned.uses == 1


class Turned(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x):
        return nn.functional.linear(x, self.weight).relu() @ self.weight
