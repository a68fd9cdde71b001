"""Ranges of weights for each channel: along the dimension of the output channels, for every kind of layer and rank."""

import logging

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model

RANKS = (1, 2, 3)
# Input channels, output channels, groups.
SIZES = [(4, 6, 1), (4, 1, 1), (1, 4, 1), (6, 6, 6), (6, 12, 6), (6, 4, 2), (6, 2, 2), (1, 1, 1)]


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 4)

    def forward(self, x):
        return self.layer(x, x * 2)


class Looked(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.layer, self.fc = cls(10, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.layer(x))


def create(model, data):
    return create_compressed_model(model, {"compression": {"algorithm": "quantization"}}, init_loader=[data])[0]


def convolution(rank, sizes, *, transposed):
    torch.manual_seed(0)
    inputs, outputs, groups = sizes
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")(inputs, outputs, 3, groups=groups)
    return layer, torch.randn(2, inputs, *[5] * rank)


def assert_each_channel_has_its_range(quantizer, weight, dim):
    """The scale of a channel is its own largest absolute value."""
    assert quantizer.shape[dim] == weight.shape[dim]
    dims = [other for other in range(weight.ndim) if other != dim]
    assert torch.equal(quantizer.scale.detach().flatten(), weight.detach().abs().amax(dims))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_of_convolutions(rank, sizes, transposed, caplog):
    model, x = convolution(rank, sizes, transposed=transposed)
    weight = model.weight.detach().clone()
    inputs, outputs, groups = sizes
    (quantizer,) = create(model, x).weight_quantizers.values()
    dim = 0 if not transposed or 1 < groups == inputs else 1
    assert_each_channel_has_its_range(quantizer, weight, dim)
    # Fewer scales than channels are said.
    shared = [record for record in caplog.records if "share" in record.message]
    assert bool(shared) == (quantizer.scale.numel() < outputs)
    if shared:
        assert f"the {outputs} output channels of 'weight' share {quantizer.scale.numel()} scale" in shared[0].message
        assert shared[0].levelno == logging.WARNING


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_output_channel_of_a_transposed_convolution_has_one_scale(rank, sizes):
    model, x = convolution(rank, sizes, transposed=True)
    (quantizer,) = create(model, x).weight_quantizers.values()
    inputs, outputs, groups = sizes
    scales = quantizer.scale.detach().expand(inputs, outputs // groups, *[3] * rank)
    by_group = scales.reshape(groups, inputs // groups, outputs // groups, -1)
    assert torch.equal(by_group, by_group[:, :1, :, :1].expand_as(by_group))


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: nn.Linear(5, 3), torch.randn(2, 5)),
        (lambda: nn.Linear(5, 1), torch.randn(2, 5)),
        (lambda: nn.Linear(1, 3), torch.randn(2, 1)),
        (Bilinear, torch.randn(2, 5)),
        (lambda: Looked(nn.Embedding), torch.randint(10, (2, 3))),
        (lambda: Looked(nn.EmbeddingBag), torch.randint(10, (2, 3))),
    ],
)
def test_of_other_layers_is_the_first_dimension(make, data):
    torch.manual_seed(0)
    model = make()
    layer = getattr(model, "layer", model)
    weight = layer.weight.detach().clone()
    controller = create(model, data)
    name = "layer|WEIGHT" if layer is not model else "|WEIGHT"
    assert_each_channel_has_its_range(controller.weight_quantizers[name], weight, 0)


@pytest.mark.usefixtures("fast_exporter")
@pytest.mark.parametrize("sizes", [(4, 1, 1), (6, 6, 6), (6, 12, 6), (6, 4, 2), (6, 2, 2)], ids=str)
def test_exported_files_compute_the_same(sizes, export):
    layer, x = convolution(2, sizes, transposed=True)
    model = nn.Sequential(layer, nn.BatchNorm2d(sizes[1]), nn.ReLU(), nn.Conv2d(sizes[1], 3, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 2, sizes[1]))
    controller = create(model, x)
    _, file = export(controller, x)
    found = torch.from_numpy(file.run(x)[0])
    assert torch.allclose(found, controller.model(x).detach(), atol=0.02 * found.abs().max().item())
