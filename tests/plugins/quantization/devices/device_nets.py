"""Small networks with what runtimes treat differently, and how tests quantize them for a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from tests.onnx_helpers import Wired, norm

# Small enough for kernels that need no compiler.
IMAGES, VECTORS, TOKENS = (8, 4, 4), (16,), (6, 16)
NEW_DEVICES = ["onnxruntime-cpu", "openvino-cpu", "tensorrt", "xnnpack"]


def conv(ins=8, outs=8, kernel=3, **options):
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **options)


def conv_relu():
    return Wired(
        lambda m, x: m.fc(F.relu(m.bn(m.b(F.relu(m.a(x))))).flatten(1)),
        **{"a": conv(), "b": conv(), "bn": norm(8), "fc": nn.Linear(128, 4)},
    )


def conv_silu():
    return Wired(lambda m, x: m.b(F.silu(m.bn(m.a(x)))), a=conv(), bn=norm(8), b=conv())


def relu6():
    return Wired(lambda m, x: m.b(F.relu6(m.bn(m.a(x)))), a=conv(), bn=norm(8), b=conv())


def residual():
    def forward(m, x):
        h = F.relu(m.n0(m.stem(x)))
        h = F.relu(m.n2(m.c2(F.relu(m.n1(m.c1(h))))) + h)
        return m.fc(m.pool(h).flatten(1))

    layers = {"stem": conv(), "n0": norm(8), "c1": conv(), "n1": norm(8), "c2": conv(), "n2": norm(8)}
    return Wired(forward, **layers, pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 4))


def downsample():
    def forward(m, x):
        return m.last(F.relu(m.n2(m.c2(F.relu(m.c1(x)))) + m.n3(m.c3(x))))

    layers = {"c1": conv(), "c2": conv(), "n2": norm(8), "c3": conv(8, 8, 1), "n3": norm(8)}
    return Wired(forward, **layers, last=conv())


def depthwise():
    def forward(m, x):
        return m.p(F.relu6(m.dn(m.d(F.relu6(m.en(m.e(x)))))))

    deep = conv(16, 16, groups=16)
    return Wired(forward, e=conv(8, 16, 1), en=norm(16), d=deep, dn=norm(16), p=conv(16, 8, 1))


def squeeze():
    def forward(m, x):
        x = F.relu(m.n(m.a(x)))
        return m.b(x * torch.sigmoid(m.f2(F.relu(m.f1(m.pool(x))))))

    layers = {"a": conv(), "n": norm(8), "pool": nn.AdaptiveAvgPool2d(1), "f1": conv(8, 4, 1), "f2": conv(4, 8, 1)}
    return Wired(forward, **layers, b=conv())


def concat():
    def forward(m, x):
        return m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1))

    return Wired(forward, a=conv(), b=conv(), c=conv(16, 8))


def linear_head():
    return Wired(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(16, 16), b=nn.Linear(16, 4))


def attention():
    def forward(m, x):
        y = m.ln(x)
        scores = torch.softmax(m.q(y) @ m.k(y).transpose(1, 2) * 0.25, -1)
        h = x + m.o(scores @ m.v(y))
        return h + m.fc(F.gelu(h))

    return Wired(forward, ln=nn.LayerNorm(16), **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "o", "fc")})


def layernorm():
    def forward(m, x):
        return m.b(F.gelu(m.a(m.ln(m.d(x).permute(0, 2, 3, 1)))))

    return Wired(forward, d=conv(groups=8), ln=nn.LayerNorm(8), a=nn.Linear(8, 16), b=nn.Linear(16, 8))


def upsample():
    return Wired(lambda m, x: m.b(F.interpolate(F.relu(m.a(x)), scale_factor=2)), a=conv(), b=conv())


def bilinear():
    def forward(m, x):
        return m.b(F.interpolate(F.relu(m.a(x)), scale_factor=2, mode="bilinear"))

    return Wired(forward, a=conv(), b=conv())


def transposed():
    return Wired(lambda m, x: m.b(F.relu(m.a(x))), a=nn.ConvTranspose2d(8, 8, 2, 2), b=conv())


NETS = {
    "conv_relu": (conv_relu, IMAGES),
    "conv_silu": (conv_silu, IMAGES),
    "relu6": (relu6, IMAGES),
    "residual": (residual, IMAGES),
    "downsample": (downsample, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "squeeze": (squeeze, IMAGES),
    "concat": (concat, IMAGES),
    "linear_head": (linear_head, VECTORS),
    "attention": (attention, TOKENS),
    "layernorm": (layernorm, IMAGES),
    "upsample": (upsample, IMAGES),
    "bilinear": (bilinear, IMAGES),
    "transposed": (transposed, IMAGES),
}


def batch(name, samples=4):
    return torch.randn(samples, *NETS[name][1], generator=torch.Generator().manual_seed(1))


def quantized(name, device, *, state=None, **section):
    """Returns the controller and the model of one of the nets, calibrated on random values."""
    torch.manual_seed(0)
    config = {"target_device": device, "compression": {"algorithm": "quantization", **section}}
    if state is not None:
        return create_compressed_model(NETS[name][0]().eval(), config, compression_state=state)
    return create_compressed_model(NETS[name][0]().eval(), config, init_loader=[batch(name)])


def quantizers(controller, group="non_weight_quantizers"):
    return getattr(controller.algorithms["quantization"], group)
