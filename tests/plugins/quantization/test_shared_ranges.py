"""Ranges of quantizers that several tensors share: a sample's extremes are over all of them."""

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from tests.plugins.quantization.test_ranges import HIGH, LOW, TYPES, collector, expected

SAMPLES = 12


class Parts(nn.Module):
    """A concatenation of parts of different sizes and magnitudes, in front of a convolution."""

    def __init__(self, groups=1):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(9, 9, 3, groups=groups)
        with torch.no_grad():
            self.small.weight.mul_(0.01), self.small.bias.mul_(0.01)

    def parts(self, x):
        return self.small(x), self.large(x)

    def forward(self, x):
        return self.last(torch.cat(self.parts(x), 1))


def created(model, data, kind, mode, **section):
    ranges = {"type": kind, "num_init_samples": SAMPLES}
    if "percentile" in kind:
        ranges["params"] = {"min_percentile": LOW, "max_percentile": HIGH}
    quiet = {"ignored_scopes": ["{re}.*"]}  # weights stay as they are, so that activations are known
    section = {"weights": quiet, "activations": {"mode": mode}, "initializer": {"range": ranges}, **section}
    return create_compressed_model(model, {"compression": {"algorithm": "quantization", **section}}, init_loader=data)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_the_range_of_a_concatenation_is_that_of_the_whole(kind, mode):
    torch.manual_seed(0)
    model = Parts()
    data = (torch.randn(SAMPLES, 3, 6, 6) * torch.linspace(0.5, 2, SAMPLES).view(-1, 1, 1, 1)).split(5)
    wide = Parts().double()
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    with torch.no_grad():
        whole = [torch.cat(wide.parts(x.double()), 1) for x in data]
    controller, _ = created(model, data, kind, mode)
    (quantizer,) = [module for name, module in controller.non_weight_quantizers.items() if "small" in name]
    low, high = (np.float64(bound).item() for bound in expected(kind, mode, whole, None, False))
    if mode == "symmetric":
        assert quantizer.scale.item() == pytest.approx(max(abs(low), abs(high)), rel=1e-5)
    else:
        assert quantizer.input_low.item() == pytest.approx(low, rel=1e-5)
        assert quantizer.input_range.item() == pytest.approx(high - low, rel=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_a_module_that_is_called_often_has_the_range_of_all_its_calls(kind):
    torch.manual_seed(0)
    data = list(torch.randn(3, 4, 6))
    found = collector(kind, "asymmetric")
    for batch in data:
        with found.one_batch():
            for factor in (0.1, 3.0, 1.0):
                found.update(batch * factor)
    whole = [torch.cat([batch * factor for factor in (0.1, 3.0, 1.0)], 1) for batch in data]
    for bound, truth in zip(found.finalize(), expected(kind, "asymmetric", whole, None, False), strict=True):
        np.testing.assert_allclose(bound.numpy(), truth, rtol=1e-6)


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_parts_may_have_other_numbers_of_samples(mode):
    torch.manual_seed(0)
    windows, images, constant = torch.randn(12, 5), torch.randn(4, 7), torch.tensor([[-9.0, 0.5]])
    for parts in ([windows, images, constant], [constant, images, windows]):
        found = collector("mixed_min_max", mode)
        with found.one_batch():
            for part in parts:
                found.update(part)
        # Three windows make an image; the constant is part of each.
        whole = torch.cat([windows.reshape(4, 15), images, constant.expand(4, 2)], 1)
        for bound, truth in zip(found.finalize(), expected("mixed_min_max", mode, [whole], None, False), strict=True):
            np.testing.assert_allclose(bound.numpy(), np.squeeze(truth), rtol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_an_error_leaves_nothing_of_a_batch(kind):
    found = collector(kind)
    with pytest.raises(RuntimeError, match="stop"), found.one_batch():
        found.update(torch.full((2, 3), 100.0))
        raise RuntimeError("stop")
    if kind.startswith("mean"):
        found.update(torch.ones(2, 3))
        assert found.finalize().max == 1
