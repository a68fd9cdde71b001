"""Small models of the kinds that practitioners export: one for each way in which a graph can be difficult."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.onnx_helpers import Wired


@dataclass(frozen=True)
class Small:
    """A model of the matrix.

    Attributes:
        make: Returns the model.
        inputs: Returns the arguments of its forward.
        section: Settings of quantization.
        root: Further keys of the config.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    section: dict[str, Any] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)


def image(size: int = 12, channels: int = 3, batch: int = 4) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(batch, channels, size, size),)


def sequence(length: int = 6, width: int = 8) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(4, length, width),)


def ids(length: int = 6) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randint(20, (4, length)),)


def convnet(*more: nn.Module, norm: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=not norm), *([nn.BatchNorm2d(8)] if norm else [])]
    pooled = [nn.Conv2d(8, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers, activation(), *more, *pooled)


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.norm(m.stem(x)))
    return m.head(torch.relu(x + m.second(torch.relu(m.first(x)))).mean((2, 3)))


def excited(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = F.silu(m.stem(x))
    x = x * torch.sigmoid(m.up(F.silu(m.down(x.mean((2, 3), keepdim=True)))))
    return m.head(x.mean((2, 3)))


def unet(m: Any, x: torch.Tensor) -> torch.Tensor:
    a = torch.relu(m.down(x))
    b = torch.relu(m.deep(F.max_pool2d(a, 2)))
    return m.out(torch.cat([a, m.up(b)], 1))


def detector(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = F.silu(m.stem(x))
    b = F.silu(m.deep(a))
    up = F.interpolate(b, size=a.shape[-2:], mode="nearest")
    return m.boxes(torch.cat([a, up], 1)).flatten(2), m.scores(b).sigmoid()


def dense(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.a(x))
    x = torch.cat([x, torch.relu(m.b(x))], 1)
    return m.head(torch.cat([x, torch.relu(m.c(x))], 1).mean((2, 3)))


def shuffled(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.a(x))
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.head(torch.relu(m.b(x)).mean((2, 3)))


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
    return m.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def patches(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
    return m.head(m.encoder(x)[:, 0])


def words(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(m.encoder(m.embedding(x) + m.position.weight[: x.shape[1]]).mean(1))


def decoder(m: Any, x: torch.Tensor) -> torch.Tensor:
    mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
    return F.linear(m.layer(m.embedding(x), src_mask=mask), m.embedding.weight)


def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(torch.relu(m.conv(torch.relu(m.conv(torch.relu(m.stem(x)))))).mean((2, 3)))


def two_inputs(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return m.head(torch.relu(m.left(x)) * torch.relu(m.right(y)))


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def mixer(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + m.tokens(m.one(x).transpose(1, 2)).transpose(1, 2)
    return m.head((x + m.channels(m.two(x))).mean(1))


def autoencoder(m: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    code = torch.relu(m.encode(x.flatten(1)))
    return {"code": code, "image": torch.tanh(m.decode(code)).view_as(x)}


def wired(forward: Callable[..., Any], **layers: Callable[[], nn.Module] | nn.Module) -> Callable[[], nn.Module]:
    return lambda: Wired(forward, **{k: v if isinstance(v, nn.Module) else v() for k, v in layers.items()})


class OwnLinear(nn.Module):
    """A linear layer of the user's own, with its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.1), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Patches(Wired):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu", norm_first=True)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        super().__init__(patches, patch=nn.Conv2d(3, 8, 4, 4), encoder=encoder, head=nn.Linear(8, 5))
        self.token = nn.Parameter(torch.randn(1, 1, 8))


def transformer(norm_first: bool = False, activation: str = "relu") -> nn.Module:
    return nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, activation=activation, norm_first=norm_first
    )


class LastState(nn.Module):
    """The head of a recurrent layer on its last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


conv = nn.Conv2d


MATRIX: dict[str, Small] = {
    "conv, batch norm, relu": Small(convnet, image()),
    "conv with bias": Small(lambda: convnet(norm=False), image()),
    "relu6": Small(lambda: convnet(activation=nn.ReLU6), image()),
    "hardswish": Small(lambda: convnet(activation=nn.Hardswish), image()),
    "leaky relu": Small(lambda: convnet(activation=nn.LeakyReLU), image()),
    "gelu": Small(lambda: convnet(activation=nn.GELU), image()),
    "depthwise": Small(lambda: convnet(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()), image()),
    "dilated, strided, grouped": Small(lambda: convnet(nn.Conv2d(8, 8, 3, 2, 2, 2, groups=2)), image()),
    "pooling": Small(lambda: convnet(nn.MaxPool2d(2), nn.AvgPool2d(2, 1)), image()),
    "group norm": Small(lambda: convnet(nn.GroupNorm(2, 8)), image()),
    "instance norm": Small(lambda: convnet(nn.InstanceNorm2d(8, affine=True)), image()),
    "prelu": Small(lambda: convnet(nn.PReLU(8)), image()),
    "padding by reflection": Small(lambda: convnet(nn.ReflectionPad2d(1)), image()),
    "pixel shuffle": Small(lambda: convnet(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2)), image()),
    "residual": Small(
        wired(
            residual,
            stem=lambda: conv(3, 8, 3, padding=1),
            norm=lambda: nn.BatchNorm2d(8),
            first=lambda: conv(8, 8, 3, padding=1),
            second=lambda: conv(8, 8, 1),
            head=lambda: nn.Linear(8, 5),
        ),
        image(),
    ),
    "squeeze and excitation": Small(
        wired(
            excited,
            stem=lambda: conv(3, 8, 3),
            down=lambda: conv(8, 4, 1),
            up=lambda: conv(4, 8, 1),
            head=lambda: nn.Linear(8, 5),
        ),
        image(),
    ),
    "u-net": Small(
        wired(
            unet,
            down=lambda: conv(3, 8, 3, padding=1),
            deep=lambda: conv(8, 16, 3, padding=1),
            up=lambda: nn.ConvTranspose2d(16, 8, 2, 2),
            out=lambda: conv(16, 2, 1),
        ),
        image(),
    ),
    "detector": Small(
        wired(
            detector,
            stem=lambda: conv(3, 8, 3, 2, 1),
            deep=lambda: conv(8, 8, 3, 2, 1),
            boxes=lambda: conv(16, 4, 1),
            scores=lambda: conv(8, 3, 1),
        ),
        image(16),
    ),
    "dense": Small(
        wired(
            dense,
            a=lambda: conv(3, 8, 3, padding=1),
            b=lambda: conv(8, 8, 3, padding=1),
            c=lambda: conv(16, 8, 1),
            head=lambda: nn.Linear(24, 5),
        ),
        image(),
    ),
    "channel shuffle": Small(
        wired(
            shuffled,
            a=lambda: conv(3, 8, 3),
            b=lambda: conv(8, 8, 3, groups=2),
            head=lambda: nn.Linear(8, 5),
        ),
        image(),
    ),
    "shared layer": Small(
        wired(
            shared,
            stem=lambda: conv(3, 8, 3),
            conv=lambda: conv(8, 8, 3, padding=1),
            head=lambda: nn.Linear(8, 5),
        ),
        image(),
    ),
    "conv1d": Small(
        lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)),
        lambda: (torch.randn(4, 8, 8),),
    ),
    "conv3d": Small(
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 27, 3)),
        lambda: (torch.randn(4, 2, 5, 5, 5),),
    ),
    "perceptron": Small(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
        lambda: (torch.randn(4, 8),),
    ),
    "own linear": Small(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), OwnLinear(8, 4)), lambda: (torch.randn(4, 8),)
    ),
    "gated linear": Small(
        wired(gated, gate=lambda: nn.Linear(8, 16), up=lambda: nn.Linear(8, 16), down=lambda: nn.Linear(16, 8)),
        sequence(),
    ),
    "attention": Small(wired(attention, qkv=lambda: nn.Linear(8, 24), out=lambda: nn.Linear(8, 8)), sequence()),
    "transformer layer": Small(transformer, sequence()),
    "transformer layer, norm first": Small(lambda: transformer(True, "gelu"), sequence()),
    "vision transformer": Small(Patches, image()),
    "text classifier": Small(
        wired(
            words,
            embedding=lambda: nn.Embedding(20, 8),
            position=lambda: nn.Embedding(16, 8),
            encoder=transformer,
            head=lambda: nn.Linear(8, 3),
        ),
        ids(),
    ),
    "causal language model, tied": Small(
        wired(decoder, embedding=lambda: nn.Embedding(20, 8), layer=transformer), ids()
    ),
    "mixer": Small(
        wired(
            mixer,
            one=lambda: nn.LayerNorm(8),
            two=lambda: nn.LayerNorm(8),
            tokens=lambda: nn.Linear(6, 6),
            channels=lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            head=lambda: nn.Linear(8, 3),
        ),
        sequence(),
    ),
    "lstm": Small(lambda: LastState(nn.LSTM(8, 8, batch_first=True)), sequence()),
    "gru": Small(lambda: LastState(nn.GRU(8, 8, batch_first=True)), sequence()),
    "two inputs": Small(
        wired(
            two_inputs,
            left=lambda: nn.Linear(8, 8),
            right=lambda: nn.Linear(4, 8),
            head=lambda: nn.Linear(8, 3),
        ),
        lambda: (torch.randn(4, 8), torch.randn(4, 4)),
    ),
    "several outputs": Small(
        wired(autoencoder, encode=lambda: nn.Linear(48, 8), decode=lambda: nn.Linear(8, 48)), image(4)
    ),
    "asymmetric weights": Small(convnet, image(), {"weights": {"mode": "asymmetric"}}),
    "weights of one scale": Small(convnet, image(), {"weights": {"per_channel": False}}),
    "four bits": Small(
        convnet, image(), {"weights": {"bits": 4}, "activations": {"bits": 4}}, {"target_device": "TRIAL"}
    ),
    "bfloat16": Small(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16(),
        lambda: (torch.randn(4, 8).bfloat16(),),
    ),
}
