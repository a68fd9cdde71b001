"""Bias correction for compress-core: what compression does to the mean of an output, its bias takes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Context,
    InitArgs,
    Initializer,
    InitializerConfig,
    Table,
    TableStatistics,
    UsageError,
    hookimpl,
)
from compress_core.transforms import raw_parameter, transformed_weight

_SPACE: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_SPACE |= {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3, nn.Linear: 0}

# Runs a model on the calibration batches.
Run = Callable[[nn.Module], None]


def _space(layer: nn.Module) -> int | None:
    """Returns how many dimensions follow that of the channels; None for other layers."""
    return next((dims for kind, dims in _SPACE.items() if isinstance(layer, kind)), None)


class _Mean:
    """A forward hook that keeps the mean of each channel of what a layer returns."""

    def __init__(self, space: int) -> None:
        self.space, self.count = space, 0
        self.total: torch.Tensor | float = 0.0

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        channels = output.detach().movedim(-1 - self.space, -1).flatten(0, -2) if output.ndim > 1 else output[None]
        self.total = self.total + channels.double().sum(0)
        self.count += len(channels)

    def value(self) -> torch.Tensor:
        return torch.as_tensor(self.total / self.count)


def channel_means(model: nn.Module, layers: dict[str, int], run: Run) -> dict[str, torch.Tensor]:
    """Returns the mean output of layers for each channel, in the order in which the layers run; others are left out.

    Args:
        model: The model.
        layers: Dotted name -> dimensions behind that of the channels.
        run: What runs it.
    """
    means = {name: _Mean(space) for name, space in layers.items()}
    order: dict[str, None] = {}
    handles = []
    for name, mean in means.items():
        layer = model.get_submodule(name)
        handles += [layer.register_forward_pre_hook(partial(_note, order, name)), layer.register_forward_hook(mean)]
    try:
        with _evaluated(model), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: means[name].value() for name in order if means[name].count}


def _note(order: dict[str, None], name: str, *_: Any) -> None:
    order.setdefault(name)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _last(layer: nn.Module) -> nn.Module:
    """Returns what a layer ends with: it may have become a sequence of layers."""
    while isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[-1]
    return layer


def _has_bias(layer: nn.Module) -> bool:
    return _space(layer) is not None and layer.bias is not None


class BiasCorrectionConfig(InitializerConfig):
    """Section `initializer.bias_correction`."""

    num_samples: int = Field(256, ge=1, description="samples that the means are taken over")


class BiasCorrection(Initializer):
    """Empirical bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2), in the order of the layers.

    A layer is corrected when those before it have been: its inputs are those that it is going to have. That takes a
    forward of the compressed model on all samples for each layer.
    """

    name = "bias_correction"
    Config = BiasCorrectionConfig
    struct = InitArgs
    needs_uncompressed = "creation"

    config: BiasCorrectionConfig
    _report: TableStatistics | None = None

    @hookimpl
    def compress_initialize(self, model: nn.Module, context: Context) -> None:
        """Measures the uncompressed model, then corrects the compressed one."""
        data = context.calibration_data(self.paths[0], InitArgs)
        batches = [batch for batch, _ in data.batches(self.config.num_samples)]

        def run(target: nn.Module) -> None:
            for batch in batches:
                data.call(target, batch)

        with context.uncompressed() as uncompressed:
            spaces = {name: _space(module) for name, module in uncompressed.named_modules()}
            layers = {name: space for name, space in spaces.items() if space is not None}
            wanted = channel_means(uncompressed, layers, run)
        there = dict(model.named_modules())
        ends = {name: _last(there[name]) for name in wanted if name in there and _has_bias(_last(there[name]))}
        before = {name: _correct(model, name, layers[name], wanted[name], ends[name], run) for name in ends}
        means = channel_means(model, {name: layers[name] for name in ends}, run)
        rows = [(name, _size(before[name]), _size(wanted[name] - means[name])) for name in ends]
        left = [(name,) for name in layers if name not in ends]
        tables = [
            Table("corrected layers", ("layer", "mean shift before", "after"), rows),
            Table("layers left alone: no bias, or never run", ("layer",), left),
        ]
        values = {"corrected": len(rows), "left_alone": len(left)}
        self._report = TableStatistics(values, tables, title="Bias correction")

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Refuses."""
        raise UsageError("bias correction compares with the uncompressed model, which is gone when creation is over")

    def statistics(self) -> TableStatistics | None:
        """Returns by how much outputs were off, on average over a layer's channels."""
        return self._report


def _correct(model: nn.Module, name: str, space: int, wanted: torch.Tensor, end: nn.Module, run: Run) -> torch.Tensor:
    """Returns the difference of the means, which the bias has taken, but for what a transform has masked of it."""
    shift = wanted - channel_means(model, {name: space}, run)[name]
    bias = raw_parameter(end, "bias")
    with torch.no_grad():
        bias.add_(torch.where(transformed_weight(end, "bias") == bias, shift.to(bias), 0))
    return shift


def _size(shift: torch.Tensor) -> float:
    return float(shift.abs().mean())


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns bias correction."""
    return [BiasCorrection]
