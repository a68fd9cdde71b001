"""Small networks whose modules and calls have the names of networks that NNCF's documents are for.

A document names layers, `MobileNetV3/Sequential[features]/...`, so what can run it is a network with these names; how
many channels it has does not matter. Written from the names in the graphs and documents of NNCF, without its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# MobileNetV3 small: (expands, squeezes, is residual, activation) of each block.
_MOBILE_BLOCKS = (
    (False, True, False, nn.ReLU),
    (True, False, False, nn.ReLU),
    (True, False, True, nn.ReLU),
    *((True, True, residual, nn.Hardswish) for residual in (False, True, True, False, True, False, True, True)),
)
# RMNet: number of blocks of each stage; the first of all stages but one makes pictures smaller.
_RMNET_STAGES = (4, 9, 11, 12)
_WIDTH = 8
_WIDE = 32  # where documents prune, of which eight or sixteen channels at a time can go


class Conv2dNormActivation(nn.Sequential):
    """Convolution, batch norm, and perhaps an activation in place."""

    def __init__(self, channels: int, activation: type[nn.Module] | None, outputs: int = _WIDTH) -> None:
        layers = [nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([] if activation is None else [activation(inplace=True)]))


class SqueezeExcitation(nn.Module):
    """A factor for each channel, computed from its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(_WIDTH, _WIDTH, 1), nn.Conv2d(_WIDTH, _WIDTH, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


class InvertedResidual(nn.Module):
    """A block of MobileNetV3."""

    def __init__(self, expands: bool, squeezes: bool, residual: bool, activation: type[nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2dNormActivation(_WIDTH, activation) for _ in range(1 + expands)]
        layers += [SqueezeExcitation()] if squeezes else []
        self.block = nn.Sequential(*layers, Conv2dNormActivation(_WIDTH, None))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.block(x)
        if self.residual:
            result += x
        return result


class MobileNetV3(nn.Module):
    """The names of torchvision's mobilenet_v3_small; takes float (N, 3, H, W), gives (N, classes)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, nn.Hardswish),
            *(InvertedResidual(*block) for block in _MOBILE_BLOCKS),
            Conv2dNormActivation(_WIDTH, nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(_WIDTH, _WIDTH),
            nn.Hardswish(inplace=True),
            nn.Dropout(0.2, inplace=True),
            nn.Linear(_WIDTH, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class RMBlock(nn.Module):
    """A block of RMNet: the same activation is called three times."""

    def __init__(self, downsample: bool) -> None:
        super().__init__()
        stride, self.downsample = 2 if downsample else 1, downsample
        self.squeeze_conv, self.squeeze_bn = nn.Conv2d(_WIDTH, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.dw_conv, self.dw_bn = nn.Conv2d(4, 4, 3, stride, 1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.expand_conv, self.expand_bn = nn.Conv2d(4, _WIDTH, 1, bias=False), nn.BatchNorm2d(_WIDTH)
        self.activation = nn.ELU(inplace=True)
        if downsample:
            self.skip_conv, self.skip_conv_bn = nn.Conv2d(_WIDTH, _WIDTH, 1, bias=False), nn.BatchNorm2d(_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.activation(self.squeeze_bn(self.squeeze_conv(x)))
        result = self.activation(self.dw_bn(self.dw_conv(result)))
        result = F.dropout(self.expand_bn(self.expand_conv(result)), 0.1, self.training, inplace=True)
        if self.downsample:
            x = self.skip_conv_bn(self.skip_conv(F.max_pool2d(x, 2, 2)))
        result += x
        return self.activation(result)


class RMNetBody(nn.Module):
    """The stages of RMNet."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential()
        for name, layer in (
            ("data_bn", nn.BatchNorm2d(3)),
            ("conv1", nn.Conv2d(3, _WIDTH, 3, 2, 1, bias=False)),
            ("bn1", nn.BatchNorm2d(_WIDTH)),
            ("relu1", nn.ReLU(inplace=True)),
        ):
            first.add_module(name, layer)
        self.stages = nn.Sequential()
        self.stages.add_module("stage_0", first)
        for stage, blocks in enumerate(_RMNET_STAGES, start=1):
            layers = [RMBlock(downsample=stage > 1 and block == 0) for block in range(blocks)]
            self.stages.add_module(f"stage_{stage}", nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)


class RMNetClassifierCifar(nn.Module):
    """The names of NNCF's RMNet for CIFAR; takes float (N, 3, 32, 32), gives (N, classes)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.backbone = RMNetBody()
        self.extra_conv, self.extra_conv_bn = nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(_WIDTH)
        self.extra_conv_2, self.extra_conv_2_bn = nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(_WIDTH)
        self.fc = nn.Conv2d(_WIDTH, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.elu(self.extra_conv_bn(self.extra_conv(self.backbone(x))))
        x = F.relu(self.extra_conv_2_bn(self.extra_conv_2(x)))
        x = self.fc(F.dropout(x, 0.1, self.training))
        return x.view(-1, x.size(1))


class UNetConvBlock(nn.Module):
    """Two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, _WIDE):
            layers += [nn.Conv2d(inputs, _WIDE, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(_WIDE)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class UNetUpBlock(nn.Module):
    """Makes pictures larger, and joins them with those of the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv_block = nn.ConvTranspose2d(_WIDE, _WIDE, 2, 2), UNetConvBlock(2 * _WIDE)

    def forward(self, x: torch.Tensor, bridge: torch.Tensor) -> torch.Tensor:
        return self.conv_block(torch.cat([self.up(x), bridge], 1))


class UNet(nn.Module):
    """The names of NNCF's UNet; takes float (N, 3, H, W), H and W multiples of 16, gives (N, classes, H, W)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.down_path = nn.ModuleList(UNetConvBlock(channels) for channels in (3, *[_WIDE] * 4))
        self.up_path = nn.ModuleList(UNetUpBlock() for _ in range(4))
        self.last = nn.Conv2d(_WIDE, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bridges = []
        for number, block in enumerate(self.down_path):
            x = block(x)
            if number < len(self.up_path):
                bridges.append(x)
                x = F.max_pool2d(x, 2)
        for block in self.up_path:
            x = block(x, bridges.pop())
        return self.last(x)


class ICNet(nn.Module):
    """Branches of two sizes; NNCF's ICNet interpolates its input, too. (N, 3, H, W) -> (N, classes, H, W)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.small, self.large = Conv2dNormActivation(3, nn.ReLU, _WIDE), Conv2dNormActivation(3, nn.ReLU, _WIDE)
        self.join, self.last = Conv2dNormActivation(_WIDE, nn.ReLU, _WIDE), nn.Conv2d(_WIDE, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        small = F.interpolate(self.small(half), scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(self.join(small + self.large(x)))


class SSD(nn.Module):
    """A detector of NNCF's kind: features, and a head for boxes and one for classes; not its names, which no list has.

    Takes float (N, 3, H, W), gives boxes (N, boxes, 4) and scores (N, boxes, classes).
    """

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.basenet = nn.ModuleList(
            [
                Conv2dNormActivation(3, nn.ReLU, _WIDE),
                nn.MaxPool2d(2),
                Conv2dNormActivation(_WIDE, nn.ReLU, _WIDE),
                nn.MaxPool2d(2),
            ]
        )
        self.loc, self.conf = nn.Conv2d(_WIDE, 8, 3, padding=1), nn.Conv2d(_WIDE, 2 * classes, 3, padding=1)
        self.classes = classes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.basenet:
            x = layer(x)
        boxes, scores = (head(x).permute(0, 2, 3, 1).reshape(len(x), -1) for head in (self.loc, self.conf))
        return boxes.view(len(x), -1, 4), scores.view(len(x), -1, self.classes)
