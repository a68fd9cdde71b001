"""What `create_compressed_model` costs, in training steps of the plain model.

Usage: python -m benchmarks.creation_cost [--rounds 5] [--models mobilenet_v2 bert ...] [--sizes small usual]

A step is forward, backward and SGD. Sizes are `usual` (32 images of 224x224 pixels, 16 sequences of 128 tokens) and
`small` (2 images of 64x64, 2 sequences of 16; transformers of 2 blocks). Each cell is a process of its own: `first` is
the first creation in it, as in a training script, after some plain steps (torch imports its compiler for any
optimizer); `creation` is the median of the later ones, steps and creations in turn. Passes over the user's data are not
counted, as their length is the user's to choose: ranges come from one batch and are timed apart, and so is adaptation.
CPU time of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.networks import VisionTransformer, mobilenet_v2, resnet50


class BertBlock(nn.Module):
    """A block of BERT (Devlin et al. 2019): attention in four linear layers, normalized last."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / self.size**0.5 + mask
        attended = self.dropout(scores.softmax(-1)) @ value
        attended = self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """An encoder like BERT, with a classifier on the first token."""

    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(BertBlock(width, heads) for _ in range(depth))
        self.classifier = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = (tokens == 0)[:, None, None, :] * -1e4
        x = self.norm(self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x, mask)
        return self.classifier(x[:, 0])


class BasicBlock(nn.Module):
    """The block of ResNet-18 (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Sequential(*shortcut) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet18() -> nn.Sequential:
    """ResNet-18 for images of 224x224 pixels."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [BasicBlock(i, o, 2 if o > i else 1) for i, o in itertools.pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class MBConv(nn.Module):
    """The block of EfficientNet (Tan & Le 2019): expand, depthwise, squeeze and excite, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion

        def layer(i: int, o: int, k: int = 1, s: int = 1, groups: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]

        expand = [*layer(inputs, hidden), nn.SiLU(inplace=True)] if expansion > 1 else []
        self.spatial = nn.Sequential(*expand, *layer(hidden, hidden, kernel, stride, hidden), nn.SiLU(inplace=True))
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, inputs // 4, 1), nn.SiLU(inplace=True)]
        self.scale = nn.Sequential(*squeeze, nn.Conv2d(inputs // 4, hidden, 1), nn.Sigmoid())
        self.project = nn.Sequential(*layer(hidden, outputs))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.spatial(x)
        out = self.project(out * self.scale(out))
        return x + out if self.is_residual else out


def efficientnet_b0() -> nn.Sequential:
    """EfficientNet-B0, without stochastic depth."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU(inplace=True)]
    inputs = 32
    for expansion, kernel, stride, outputs, count in (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ):  # fmt: skip
        for number in range(count):
            blocks.append(MBConv(inputs, outputs, kernel, 1 if number else stride, expansion))
            inputs = outputs
    head = [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU(inplace=True)]
    return nn.Sequential(*blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000))


def vit(size: str) -> nn.Module:
    """ViT-S/16, or one of 2 blocks for small images."""
    return VisionTransformer(224, 16, 384, 12, 1000) if size == "usual" else VisionTransformer(64, 8, 64, 2)


def bert(size: str) -> nn.Module:
    """BERT-base, or one of 2 blocks."""
    return Bert() if size == "usual" else Bert(32, 2, 2, 100)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "resnet18": lambda _: resnet18(),
    "resnet50": lambda _: resnet50(),
    "mobilenet_v2": lambda _: mobilenet_v2(1000),
    "efficientnet_b0": lambda _: efficientnet_b0(),
    "vit": vit,
    "bert": bert,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "filter_pruning": {"pruning_init": 0.3, "params": {"pruning_target": 0.5}},
    "magnitude_sparsity": {"sparsity_init": 0.3, "params": {"sparsity_target": 0.5}},
    "quantization": {"initializer": {"range": {"num_init_samples": 0}}},
}
CONFIGS = {**{name: [name] for name in SECTIONS}, "all three": list(SECTIONS)}
SHAPES = {"usual": ((32, 3, 224, 224), (16, 128)), "small": ((2, 3, 64, 64), (2, 16))}


def inputs_of(model: str, size: str) -> torch.Tensor:
    """Returns a batch."""
    images, tokens = SHAPES[size]
    return torch.randint(1, 100, tokens) if model == "bert" else torch.randn(images)


def document_of(model: str, size: str, names: list[str]) -> dict[str, Any]:
    """Returns the config of some algorithms, without passes over data."""
    shape = list(SHAPES[size][model == "bert"])
    info = {"sample_size": shape, "type": "long" if model == "bert" else "float"}
    return {"input_info": info, "compression": [{"algorithm": name, **SECTIONS[name]} for name in names]}


class PlainStep:
    """Forward, backward and an SGD step of the plain model."""

    def __init__(self, model: str, size: str) -> None:
        self.model = MODELS[model](size).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.inputs = inputs_of(model, size)

    def __call__(self) -> float:
        started = time.process_time()
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        return time.process_time() - started


def creation(model: str, size: str, names: list[str], *, data: str = "") -> float:
    """Returns the time of one creation, with a pass over a batch for `ranges` or `adaptation` if asked for."""
    plain, document = MODELS[model](size), document_of(model, size, names)
    for section in document["compression"] if data else ():
        request = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 1}} if data == "adaptation" else {}
        section["initializer"] = {**section.get("initializer", {}), **request}
        if data == "ranges" and section["algorithm"] == "quantization":
            section["initializer"] = {"range": {"num_init_samples": 1}}
    inputs = inputs_of(model, size)
    loader = [(inputs, torch.zeros(len(inputs)))] if data else None
    started = time.process_time()
    create_compressed_model(plain, document, init_loader=loader)
    return time.process_time() - started


def cell(model: str, size: str, config: str, rounds: int) -> dict[str, Any]:
    """Measures one cell in this process; seconds and ratios."""
    names = CONFIGS[config]
    step = PlainStep(model, size)
    steps = [step() for _ in range(3 if size == "usual" else 10)][1:]
    first = creation(model, size, names)
    times = []
    for _ in range(rounds):
        steps.append(step())
        times.append(creation(model, size, names))
    unit = statistics.median(steps)
    low, median, high = statistics.quantiles([value / unit for value in times], n=4)
    found = {"step": unit, "first": first / unit, "creation": median, "low": low, "high": high}
    passes = [
        *(["ranges"] if "quantization" in names else []),
        *(["adaptation"] if model not in {"vit", "bert"} else []),
    ]
    for data in passes if size == "usual" else ():
        found[data] = (creation(model, size, names, data=data) - statistics.median(times)) / unit
    return found


def table(size: str, cells: dict[str, dict[str, Any]]) -> Table:
    """Shows the cells of one size."""
    rows = []
    for name, found in cells.items():
        spread = f"{found['creation']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"
        passes = [f"{found[data]:+.1f}" if data in found else "" for data in ("ranges", "adaptation")]
        rows.append((*name.split(", "), f"{1000 * found['step']:.0f}", f"{found['first']:.1f}", spread, *passes))
    for key in ("first", "creation"):
        median = statistics.median(found[key] for found in cells.values())
        rows.append(
            (f"median, {key}", "", "", *(("", f"{median:.1f}") if key == "creation" else (f"{median:.1f}", "")))
        )
    headers = ("model", "config", "step in ms", "first", "creation", "ranges", "adaptation")
    filled = [(*row, *[""] * (len(headers) - len(row))) for row in rows]
    return Table(f"Creation in plain training steps, {size} inputs, CPU time, median [quartiles]", headers, filled)


def main() -> None:
    """Measures, prints, and writes results/creation_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=["small", "usual"], choices=list(SHAPES))
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.cell:
        print(json.dumps(cell(*options.cell, options.rounds)))
        return
    results: dict[str, dict[str, Any]] = {}
    for size in options.sizes:
        results[size] = {}
        for model in options.models:
            for config in options.configs:
                command = [sys.executable, "-m", "benchmarks.creation_cost", "--rounds", str(options.rounds)]
                done = subprocess.run(
                    [*command, "--cell", model, size, config], capture_output=True, text=True, check=True
                )
                results[size][f"{model}, {config}"] = json.loads(done.stdout.splitlines()[-1])
                report.write("creation_cost", {"rounds": options.rounds, "cells": results})
        report.show(table(size, results[size]))


if __name__ == "__main__":
    main()
