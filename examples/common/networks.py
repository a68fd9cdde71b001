"""Networks of the demo and the benchmarks, and two public ones with their trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from examples.common.fetch import fetched


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (stride aside), and its batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        channels: Input channels.
        widths: Channels of the stages; each but the first halves the size.
        blocks: Residual blocks in each stage.
        classes: Number of classes.
        stem_kernel: Kernel of the first convolution.
        stem_stride: Its stride.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        classes: int = 10,
        stem_kernel: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], stem_kernel, stem_stride, stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for index, width in enumerate(widths):
            strides = [1 if index == 0 else 2] + [1] * (blocks - 1)
            stage = []
            for stride in strides:
                stage.append(ResidualBlock(inputs, width, stride))
                inputs = width
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
        self.depth = len(widths)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for index in range(self.depth):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.linear(x.mean((2, 3)))


def demo_network(name: str) -> nn.Module:
    """The small network of the demo for a data set."""
    if name == "digits":
        return ResNet(1, (16, 32), blocks=1)
    return ResNet(1, (32, 64, 128), blocks=1, stem_kernel=5, stem_stride=2)


class Vgg16(nn.Module):
    """VGG16 with batch norm for images of 32x32 pixels (Simonyan & Zisserman 2015), with dropout."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for widths, dropout in (((64, 64), 0.3), ((128, 128), 0.4), *(((w, w, w), 0.4) for w in (256, 512, 512))):
            for index, width in enumerate(widths):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                layers.append(nn.MaxPool2d(2) if index == len(widths) - 1 else nn.Dropout(dropout))
                inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def resnet56_cifar10() -> ResNet:
    """ResNet-56 (He et al. 2016, shortcuts with convolutions) with public weights, 93.2 % on CIFAR-10."""
    model = ResNet(3, (16, 32, 64), blocks=9)
    model.load_state_dict(_pickled_state("resnet56_cifar10_0.9320_45k.pth"))
    return model.eval()


def vgg16_bn_cifar10() -> Vgg16:
    """VGG16 with batch norm and public weights, 92.25 % on CIFAR-10."""
    model = Vgg16()
    model.load_state_dict(_pickled_state("vgg16_cifar10_0.9225_45k.pth"))
    return model.eval()


def _pickled_state(file: str) -> dict[str, torch.Tensor]:
    """Returns the state of a network that was saved as a whole object, without running code that came with it.

    The loader knows stand-ins for the pickled classes, and torch's own layers, and nothing else.
    """
    pickled = ("resnet.ResNet", "resnet.BasicBlock", "torchvision.models.vgg.VGG")
    stand_ins = [(type(name.rpartition(".")[2], (nn.Module,), {}), name) for name in pickled]
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Dropout]
    with torch.serialization.safe_globals([*stand_ins, *layers, nn.Sequential, nn.Identity]):
        network = torch.load(fetched("cifar10-networks") / file, weights_only=True)
    return network.state_dict()


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 (Sandler et al. 2018): expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *(conv_bn(inputs, hidden, 1), nn.ReLU6()) if expansion > 1 else (),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def mobilenet_v2(classes: int = 10) -> nn.Sequential:
    """MobileNetV2 with the paper's widths."""
    layers: list[nn.Module] = [*conv_bn(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expansion, outputs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for index in range(count):
            layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    layers += [*conv_bn(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


def resnet18(classes: int = 10) -> ResNet:
    """A network of ResNet-18's blocks and widths, with a 3x3 stem."""
    return ResNet(3, (64, 128, 256, 512), blocks=2, classes=classes, stem_stride=2)


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al. 2016): 1x1, 3x3, 1x1, four times as wide at its end, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            *conv_bn(inputs, width, 1),
            nn.ReLU(),
            *conv_bn(width, width, 3, stride),
            nn.ReLU(),
            *conv_bn(width, outputs, 1),
        )
        self.shortcut = nn.Sequential() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 for images of 224x224 pixels."""
    layers: list[nn.Module] = [*conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class EncoderBlock(nn.Module):
    """A block of a vision transformer, normalized first: self-attention, and a perceptron with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) that averages its tokens."""

    def __init__(self, size: int = 64, patch: int = 8, width: int = 192, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(classes: int = 10) -> VisionTransformer:
    """A small vision transformer for images of 64x64 pixels: 6 blocks of width 192, patches of 8x8."""
    return VisionTransformer(classes=classes)
