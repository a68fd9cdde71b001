"""Activations with a scale for each channel, at inputs of depthwise convolutions: where they stand, and shrinking."""

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model

SIZE = 32


def depthwise(channels, kernel=3):
    return nn.Conv2d(channels, channels, kernel, groups=channels, padding=kernel // 2)


class Sum(nn.Module):
    """A depthwise convolution behind a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, SIZE, 3, padding=1), nn.Conv2d(3, SIZE, 1)
        self.deep, self.last, self.fc = depthwise(SIZE), nn.Conv2d(SIZE, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.last(self.deep(self.a(x) + self.b(x))).mean((2, 3)))


class Inverted(nn.Module):
    """The blocks of MobileNetV4: depthwise convolutions first, in the middle and behind the sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.first = nn.Conv2d(3, SIZE, 3, padding=1), nn.BatchNorm2d(SIZE), depthwise(SIZE)
        self.widen, self.middle_norm, self.middle = nn.Conv2d(SIZE, 64, 1), nn.BatchNorm2d(64), depthwise(64)
        self.narrow, self.behind, self.fc = nn.Conv2d(64, SIZE, 1), depthwise(SIZE, 5), nn.Linear(SIZE, 4)

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        h = h + self.narrow(self.middle(self.middle_norm(self.widen(self.first(h))).relu()))
        return self.fc((h + self.behind(h)).mean((2, 3)))


class Concatenation(nn.Module):
    """A depthwise convolution behind a concatenation along a dimension."""

    def __init__(self, dim, sizes):
        super().__init__()
        self.a, self.b, self.dim = nn.Conv2d(3, sizes[0], 1), nn.Conv2d(3, sizes[1], 1), dim
        self.deep = depthwise(sum(sizes) if dim in (1, -3) else sizes[0])

    def forward(self, x):
        return self.deep(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], self.dim))


class Tokens(nn.Module):
    """SegFormer's feed-forward: tokens become an image in front of a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.widen, self.deep = nn.Linear(6, 16), depthwise(16)

    def forward(self, x):
        x = self.widen(x).transpose(1, 2)
        size = int(x.shape[2] ** 0.5)
        return self.deep(x.reshape(x.shape[0], x.shape[1], size, size)).flatten(2).transpose(1, 2)


class Shuffled(nn.Module):
    """ShuffleNet's exchange of channels, dropout and pooling in front of a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.pool, self.deep = nn.Conv2d(3, 16, 1), nn.Dropout(), nn.MaxPool2d(2), depthwise(16)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        return self.deep(self.pool(self.drop(x)))


def create(model, data, *others):
    config = {"compression": [*others, {"algorithm": "quantization"}]}
    return create_compressed_model(model, config, init_loader=[data])[0]


def channel_shapes(controller):
    return [module.shape for module in controller.non_weight_quantizers.values() if len(module.shape) > 1]


@pytest.mark.parametrize(
    ("dim", "sizes", "shapes"),
    [
        (1, (5, 11), [(1, 5, 1, 1), (1, 11, 1, 1)]),
        (-3, (8, 8), [(1, 8, 1, 1), (1, 8, 1, 1)]),
        (3, (8, 8), [(1, 8, 1, 1)]),
        (0, (8, 8), [(1, 8, 1, 1)]),
    ],
)
def test_each_part_of_a_concatenation_of_channels_has_its_own_scales(dim, sizes, shapes):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = Concatenation(dim, sizes).eval()
    with torch.no_grad():
        model.b.weight.mul_(100)
        parts = [torch.relu(part(x)) for part in (model.a, model.b)]
    controller = create(model, x)
    assert channel_shapes(controller) == shapes
    found = [module for module in controller.non_weight_quantizers.values() if len(module.shape) > 1]
    # Weights are quantized when activations are measured.
    wanted = parts if len(shapes) == 2 else [torch.cat(parts, dim)]
    for quantizer, part in zip(found, wanted, strict=True):
        torch.testing.assert_close(quantizer.scale.flatten(), part.amax((0, 2, 3)), rtol=0.02, atol=0)
    assert torch.equal(controller.strip()(x), model(x))


@pytest.mark.parametrize(
    ("make", "data", "larger"), [(Tokens, (2, 16, 6), (2, 64, 6)), (Shuffled, (2, 3, 8, 8), (2, 3, 16, 16))]
)
def test_scales_belong_to_the_channels_that_the_convolution_reads(make, data, larger):
    torch.manual_seed(0)
    model = make().eval()
    controller = create(model, torch.randn(data))
    (shape,) = channel_shapes(controller)
    assert shape[1] == 16
    assert all(size == 1 for size in shape[2:])
    # Other images have other numbers of tokens.
    x = torch.randn(larger)
    assert torch.equal(controller.strip()(x), model(x))


@pytest.mark.usefixtures("fast_exporter")
@pytest.mark.parametrize("make", [Sum, Inverted])
def test_scales_follow_when_channels_are_removed(make, export):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    params = {"pruning_target": 0.4, "prune_first_conv": True, "num_init_steps": 0, "pruning_steps": 1}
    pruning = {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": params}
    model = make().eval()
    controller = create(model, x, pruning)
    stripped = controller.strip()
    assert torch.allclose(stripped(x), model(x), atol=1e-6)
    removed = [module.out_channels for module in stripped.modules() if isinstance(module, nn.Conv2d)]
    assert 24 in removed
    scales = [
        b.numel() for name, b in stripped.named_buffers() if name.endswith("quantization.scale") and b.numel() > 1
    ]
    assert sorted(scales) == sorted(m.groups for m in stripped.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    _, file = export(controller, x)
    assert torch.allclose(torch.from_numpy(file.run(x)[0]), stripped(x), atol=0.02 * stripped(x).abs().max().item())
