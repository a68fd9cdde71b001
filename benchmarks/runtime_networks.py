"""The networks of `benchmarks.runtimes`: well-known ones of torchvision, and small ones of the kinds that it lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.torchvision_operators import define_missing_operators


@dataclass(frozen=True)
class Case:
    """A network, and the shape of its input.

    Attributes:
        make: Returns the network with random weights.
        shape: Shape of one sample, without the batch.
        vocabulary: Number of entries, if the input holds indices; 0 for numbers.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def batch(self, size: int, seed: int) -> torch.Tensor:
        """Returns random inputs."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(self.vocabulary, (size, *self.shape), generator=generator)
        return torch.randn(size, *self.shape, generator=generator)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        define_missing_operators()
        model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(weights=None)
        return model

    return make


def _vit() -> nn.Module:
    define_missing_operators()
    transformer = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    model: nn.Module = transformer(
        image_size=224, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=1000
    )
    # Zero by default, so that the network would return zeros.
    nn.init.trunc_normal_(model.heads[-1].weight, std=0.02)  # type: ignore[index, union-attr]
    return model


class Encoder(nn.Module):
    """A BERT encoder; returns its hidden states.

    Attributes:
        bert: The model of transformers.
    """

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.BertConfig(
            vocab_size=8000, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.bert(input_ids=ids).last_hidden_state
        return found


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """A cross-stage block: one half goes through residual convolutions, then both are concatenated."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half = channels // 2
        self.one, self.two = _conv(channels, half, 1), _conv(channels, half, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_conv(half, half, 1), _conv(half, half)) for _ in range(depth))
        self.last = _conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        for block in self.blocks:
            y = y + block(y)
        result: torch.Tensor = self.last(torch.cat([y, self.two(x)], 1))
        return result


class YoloLike(nn.Module):
    """A detector with SiLU, cross-stage blocks, upsampling, concatenations and two scales of outputs."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(3, w, 6, 2), _conv(w, 2 * w, 3, 2), Split(2 * w, 1))
        self.middle = nn.Sequential(_conv(2 * w, 4 * w, 3, 2), Split(4 * w, 2))
        self.deep = nn.Sequential(_conv(4 * w, 8 * w, 3, 2), Split(8 * w, 2))
        self.reduce = _conv(8 * w, 4 * w, 1)
        self.fuse = nn.Sequential(_conv(8 * w, 4 * w, 1), Split(4 * w, 1))
        self.heads = nn.ModuleList([nn.Conv2d(4 * w, 64, 1), nn.Conv2d(8 * w, 64, 1)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middle = self.middle(self.stem(x))
        deep = self.deep(middle)
        up = F.interpolate(self.reduce(deep), size=middle.shape[-2:], mode="nearest")
        return self.heads[0](self.fuse(torch.cat([up, middle], 1))), self.heads[1](deep)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for given in (inputs, outputs):
        layers += [nn.Conv2d(given, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNetLike(nn.Module):
    """A network for segmentation with skips, transposed convolutions and a mask of the size of the image."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_double(i, o) for i, o in zip([3, *sizes[:-1]], sizes, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * s, s, 2, 2) for s in reversed(sizes[:-1]))
        self.merge = nn.ModuleList(_double(2 * s, s) for s in reversed(sizes[:-1]))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        result: torch.Tensor = self.head(x)
        return result


CASES: dict[str, Case] = {
    "resnet18": Case(_torchvision("resnet18"), (3, 224, 224)),
    "resnet50": Case(_torchvision("resnet50"), (3, 224, 224)),
    "mobilenet_v2": Case(_torchvision("mobilenet_v2"), (3, 224, 224)),
    "efficientnet_b0": Case(_torchvision("efficientnet_b0"), (3, 224, 224)),
    "vit": Case(_vit, (3, 224, 224)),
    "bert": Case(Encoder, (128,), 8000),
    "yolo-like": Case(YoloLike, (3, 320, 320)),
    "unet-like": Case(UNetLike, (3, 128, 128)),
}


def network(name: str) -> nn.Module:
    """Returns a network in eval mode, with running statistics that fit its inputs."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over batches
    model.train()
    with torch.no_grad():
        model(case.batch(8, 1))
    return model.eval()
