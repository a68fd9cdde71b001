"""What reconstruction writes is the least-squares solution."""

import numpy as np
import pytest
import torch
from torch import nn

from compress_core.transforms import get_weight_transform, raw_parameter, transformed_weight
from tests.plugins.weight_reconstruction.helpers import batches, copied, create, section, seeded

TINY = 1e-7  # as good as no damping
# Where conjugate gradients stop, weights are this near and errors much nearer.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def least_squares(x, targets, support, *, centred):
    """Independent: numpy's solver in float64, row by row."""
    x, targets = (np.asarray(values.detach().double()) for values in (x, targets))
    if centred:
        x, targets = x - x.mean(0), targets - targets.mean(0)
    solution = np.zeros((targets.shape[1], x.shape[1]))
    for row, kept in enumerate(np.asarray(support)):
        solution[row, kept] = np.linalg.lstsq(x[:, kept], targets[:, row], rcond=None)[0]
    return torch.from_numpy(solution)


@pytest.mark.parametrize("bias", [True, False])
def test_masked_linear_layer_is_lstsq_on_its_support(bias):
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 7, bias=bias)))
    data = batches(12)
    original = copied(model)
    _, report = create(model, data, section(damping=TINY))
    mask = get_weight_transform(model, "0.weight", "magnitude_sparsity").mask
    x = torch.cat(data[:4])
    expected = least_squares(x, x @ original[0].weight.T, mask, centred=bias)
    torch.testing.assert_close(model[0].weight.detach().double(), expected, **NEAR)
    if bias:
        with torch.no_grad():
            torch.testing.assert_close(model(x).mean(0), original(x).mean(0), **NEAR)
    # The others have made up for what is masked, so it is gone, and ranking the weights again masks the same.
    stored = raw_parameter(model, "0.weight")
    assert torch.equal(stored, transformed_weight(model, "0.weight"))
    (layer,) = report.layers
    assert 0 < layer.after < layer.before < 1.5
    assert layer.positions == 64


def test_reported_errors_are_those_of_the_layer_relative_to_its_variance():
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 7)))
    data, original = batches(12), copied(model)
    _, report = create(model, data)
    x = torch.cat(data[:4])
    mask = get_weight_transform(model, "0.weight", "magnitude_sparsity").mask
    with torch.no_grad():
        wanted = original(x)
        masked = x @ (original[0].weight * mask).T
        errors = [(values - wanted).var(0, correction=0).sum() for values in (masked, model(x))]
        variance = wanted.var(0, correction=0).sum()
    assert report.layers[0].before == pytest.approx(float(errors[0] / variance), rel=1e-4)
    assert report.layers[0].after == pytest.approx(float(errors[1] / variance), rel=1e-4)


def conv_of(x, layer):
    """The rows and outputs of a convolution, independently by unfold."""
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def test_masked_convolution_is_lstsq_on_unfolded_patches():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1)))
    data, original = batches(3, 9, 9), copied(model)
    create(model, data, section(damping=TINY, positions=10_000))
    mask = get_weight_transform(model, "0.weight", "magnitude_sparsity").mask
    x = conv_of(torch.cat(data[:4]), original[0])
    expected = least_squares(x, x @ original[0].weight.flatten(1).T, mask.flatten(1), centred=True)
    torch.testing.assert_close(model[0].weight.detach().flatten(1).double(), expected, **NEAR)


def test_grouped_convolution_solves_each_group_for_itself():
    whole = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))
    halves = [nn.Sequential(nn.Conv2d(2, 3, 3)).eval() for _ in range(2)]
    data = batches(4, 7, 7)
    for index, half in enumerate(halves):
        rows = slice(3 * index, 3 * index + 3)
        half[0].weight.data, half[0].bias.data = whole[0].weight.data[rows].clone(), whole[0].bias.data[rows].clone()
    create(whole, data, section(damping=TINY, positions=10_000))
    mask = get_weight_transform(whole, "0.weight", "magnitude_sparsity").mask
    for index, half in enumerate(halves):
        rows, channels = slice(3 * index, 3 * index + 3), slice(2 * index, 2 * index + 2)
        x = conv_of(torch.cat(data[:4])[:, channels], half[0])
        expected = least_squares(x, x @ half[0].weight.flatten(1).T, mask[rows].flatten(1), centred=True)
        found = whole[0].weight.detach()[rows].flatten(1).double()
        torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="reflect"),
        lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2),
        lambda: nn.Conv3d(4, 6, 2),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: nn.ConvTranspose3d(4, 6, 2),
        lambda: nn.Linear(7, 6),
    ],
)
def test_every_kind_of_layer_gets_closer_to_its_old_output(build):
    model = seeded(lambda: nn.Sequential(build()))
    dims = model[0].weight.ndim - 2
    data = batches(4, *(7, 7, 7)[: max(dims, 1)])
    _, report = create(model, data)
    assert not report.left_alone
    assert report.layers[0].after < 0.9 * report.layers[0].before
    assert report.output_error[1] < 0.9 * report.output_error[0]


def test_without_compression_nothing_moves():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    before = copied(model)
    _, report = create(model, batches(6), section(level=0.0))
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(raw_parameter(model, name).detach(), parameter.detach(), rtol=1e-5, atol=1e-6)
    assert report.kept
