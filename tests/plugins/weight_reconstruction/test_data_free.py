"""Means and variances without data: against closed forms and against samples of what is assumed."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import DataError, UsageError, create_compressed_model
from compress_weight_reconstruction.data_free.distributions import Distribution, after
from compress_weight_reconstruction.data_free.walk import Walk
from tests.plugins.weight_reconstruction.helpers import seeded

NORMAL = torch.distributions.Normal(0.0, 1.0)
CHANNELS = 6


def known(mean, variance, dim=1):
    return Distribution(torch.tensor(mean).double(), torch.tensor(variance).double(), dim)


def test_relu_of_a_normal_variable():
    mean, deviation = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0]).double(), torch.tensor([1.0, 2.0, 1e-20, 1.0, 1e20])
    deviation = deviation.double()
    given = Distribution(mean, deviation.square(), 1)
    found = after(F.relu, (torch.zeros(1, 5),), {}, [given], torch.zeros(1, 5))
    ratio = mean / deviation
    density, above = NORMAL.log_prob(ratio).exp(), NORMAL.cdf(ratio)
    expected = deviation * density + mean * above
    second = (mean.square() + deviation.square()) * above + mean * deviation * density
    torch.testing.assert_close(found.mean, expected, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(found.variance, second - expected.square(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.hardswish, F.relu6, F.leaky_relu, torch.sigmoid, F.elu])
def test_other_functions_of_a_normal_variable(function):
    generator = torch.Generator().manual_seed(0)
    given = known([-1.0, 0.3, 2.0], [0.5, 1.0, 3.0])
    samples = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    values = function(given.mean + given.variance.sqrt() * samples)
    found = after(function, (torch.zeros(1, 3),), {}, [given], torch.zeros(1, 3))
    torch.testing.assert_close(found.mean, values.mean(0), rtol=0.01, atol=0.004)
    torch.testing.assert_close(found.variance, values.var(0), rtol=0.015, atol=0.002)
    assert not found.is_normal


@pytest.mark.parametrize("function", [F.max_pool2d, torch.sin, torch.softmax])
def test_other_functions_are_not_guessed(function):
    assert after(function, (torch.zeros(1, 1),), {}, [known([0.0], [1.0])], torch.zeros(1, 1)) is None


class Net(nn.Module):
    """A batch norm that says what the inputs of a layer are, an activation function, the layer, and what follows."""

    def __init__(self, layer, following, between=None):
        super().__init__()
        self.first, self.layer, self.following = nn.BatchNorm2d(CHANNELS), layer, following
        self.between = between or nn.Identity()
        with torch.no_grad():
            self.first.weight.uniform_(0.5, 2.0)
            self.first.bias.normal_()

    def forward(self, x):
        return self.following(self.layer(self.between(F.relu(self.first(x)))))


LAYERS = {
    "convolution": lambda: (nn.Conv2d(CHANNELS, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "with a bias": lambda: (nn.Conv2d(CHANNELS, 4, (1, 2), dilation=2), nn.BatchNorm2d(4)),
    "in groups": lambda: (nn.Conv2d(CHANNELS, 8, 2, groups=2), nn.BatchNorm2d(8)),
    "depthwise": lambda: (nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.BatchNorm2d(CHANNELS)),
    "transposed": lambda: (nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2), nn.BatchNorm2d(4)),
    "transposed, overlapping": lambda: (nn.ConvTranspose2d(CHANNELS, 4, (4, 3), (2, 1), (2, 2)), nn.BatchNorm2d(4)),
    "transposed in groups": lambda: (nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)),
    "flattened": lambda: (nn.Linear(9 * CHANNELS, 5), nn.BatchNorm1d(5)),
}


def config_of(**section):
    params = {"sparsity_target": 0.5, "sparsity_level_setting_mode": "local"}
    request = {"initializer": {"data_free_correction": section}}
    document = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": params, **request}
    return {"input_info": {"sample_size": [2, CHANNELS, 3, 3]}, "compression": document}


def compressed(model, **section):
    return create_compressed_model(model, config_of(**section))[0]


def outputs(model, x):
    found = []
    handle = model.layer.register_forward_hook(lambda module, args, output: found.append(output.double()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


def moments(values):
    dims = [0, *range(2, values.ndim)]
    return values.mean(dims), values.var(dims)


@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_are_those_of_samples(kind):
    between = nn.Flatten() if kind == "flattened" else None
    model = seeded(lambda: Net(*LAYERS[kind](), between))
    x = torch.randn(20_000, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(1))
    mean, variance = moments(outputs(model, x))
    model.following.running_mean.copy_(mean)
    model.following.running_var.copy_(variance)
    before = copy.deepcopy(model)
    controller = compressed(model)
    new_mean, new_variance = moments(outputs(model, x))
    scale = variance.sqrt().float()
    assert float(((new_mean - mean) / scale).abs().max()) > 0.06
    torch.testing.assert_close(model.following.running_mean / scale, new_mean.float() / scale, rtol=0, atol=0.02)
    torch.testing.assert_close(model.following.running_var, new_variance.float(), rtol=0.05, atol=0)
    assert torch.equal(model.first.running_mean, before.first.running_mean)
    report = controller.statistics().data_free_correction.report
    assert [(c.name, c.target) for c in report.corrections] == [("layer.weight", "following")]
    assert report.left_alone == {}


def test_without_a_batch_norm_the_bias_takes_up_the_mean():
    model = seeded(lambda: Net(nn.Linear(CHANNELS, 4), nn.Identity(), nn.Sequential(nn.AvgPool2d(3), nn.Flatten())))
    x = torch.randn(20_000, CHANNELS, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 3, 3)
    mean, _ = moments(outputs(model, x))
    compressed(model)
    new, _ = moments(outputs(model, x))
    torch.testing.assert_close(new, mean, rtol=0, atol=0.02)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.layer, self.other = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(CHANNELS, 2)
        self.alone = nn.Linear(CHANNELS, 2, bias=False)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(self.layer(x)))
        pooled = self.pool(self.other(x)).flatten(1)
        return self.head(pooled) + self.alone(x.mean((2, 3)))


def test_sums_are_followed_and_what_is_not_known_has_a_reason():
    model = seeded(Residual)
    report = compressed(model).statistics().data_free_correction.report
    assert [correction.target for correction in report.corrections] == ["second", "other.bias"]
    assert report.left_alone == {
        "head.weight": "no batch norm tells what its inputs are like",
        "alone.weight": "neither a batch norm nor a bias of its own takes up the mean",
    }


def test_a_sum_of_distributions():
    walk = Walk(seeded(Residual))
    x = torch.zeros(1, CHANNELS, 2, 2)
    total = after(torch.Tensor.__add__, (x, x), {}, [known([1.0], [2.0]), known([3.0], [4.0])], x)
    assert (total.mean, total.variance, total.is_normal) == (4.0, 6.0, True)
    shifted = after(torch.add, (x, 0.5), {}, [known([1.0], [2.0])], x)
    assert (shifted.mean, shifted.variance) == (1.5, 2.0)
    # Another scale of a summand is not followed.
    assert after(torch.add, (x, x), {"alpha": 2}, [known([1.0], [2.0])] * 2, x) is None
    assert walk.places() == {}


def test_scopes_state_and_repetition():
    model = seeded(Residual)
    untouched = copy.deepcopy(model)
    controller = compressed(model, ignored_scopes=["second"])
    assert torch.equal(model.second.running_mean, untouched.second.running_mean)
    report = controller.statistics().data_free_correction.report
    assert "layer.weight" in report.left_alone
    state = json.loads(json.dumps(controller.get_compression_state()))
    config = config_of(ignored_scopes=["second"])
    resumed, _ = create_compressed_model(copy.deepcopy(untouched), config, compression_state=state)
    assert resumed.statistics().data_free_correction.report == report
    with pytest.raises(UsageError, match="adapt_batchnorm"):
        controller.initialize("data_free_correction")


def test_scopes_of_the_whole_config_may_be_for_others():
    config = config_of()
    config["ignored_scopes"] = ["second", "{re}.*add.*"]
    config["compression"]["validate_scopes"] = False
    controller = create_compressed_model(seeded(Residual), config)[0]
    report = controller.statistics().data_free_correction.report
    assert [correction.target for correction in report.corrections] == ["other.bias"]


def test_without_any_example_nothing_is_changed():
    model = seeded(Residual)
    config = {"compression": config_of()["compression"]}
    with pytest.raises(
        DataError, match=r"compression.magnitude_sparsity.initializer.data_free_correction: needs an example input"
    ):
        create_compressed_model(model, config)
    assert type(model.layer) is nn.Conv2d


def test_a_row_of_zeros_keeps_a_variance():
    model = seeded(lambda: Net(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model.layer.weight[1] *= 1e-3
    params = {"sparsity_target": 0.5, "sparsity_level_setting_mode": "local", "weight_importance": "abs"}
    request = {"initializer": {"data_free_correction": {}}}
    document = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": params, **request}
    config = {"input_info": {"sample_size": [2, CHANNELS, 3, 3]}, "compression": document}
    create_compressed_model(model, config)
    assert not bool(model.layer.weight[1].any())
    assert math.isclose(float(model.following.running_var[1]), 0.25)
