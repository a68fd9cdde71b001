"""Initial ranges: what quantizers see on calibration data, on the model as it will run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compress_core.initializers.data import CalibrationData
from compress_core.rng import preserved_rng
from compress_core.transforms.weight import resolve_parameter
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.planning import PlannedQuantizer
from compress_quantization.ranges import RangeStatistics


@dataclass
class Calibrated:
    """A quantizer that is to get its range.

    Attributes:
        planned: What it is.
        module: The quantizer.
        statistics: What it has seen so far.
        samples: How many samples it is to see.
    """

    planned: PlannedQuantizer
    module: FakeQuantize
    statistics: RangeStatistics
    samples: int


def calibrate_weights(model: nn.Module, quantizers: Iterable[Calibrated]) -> None:
    """Gives weight quantizers their ranges, from the weights as the transforms before them leave them."""
    for quantizer in quantizers:
        owner, name = resolve_parameter(model, quantizer.planned.parameter)
        with torch.no_grad(), _observing([quantizer]):
            getattr(owner, name)
        _set_range(quantizer)


def calibrate_activations(model: nn.Module, quantizers: list[Calibrated], data: CalibrationData) -> None:
    """Gives activation quantizers their ranges, from the tensors that pass them while none of them is active.

    Args:
        model: The model; everything runs in eval mode without gradients, modes and random generators come back.
        quantizers: The quantizers; they see batches until each has had the samples that it is to see.
        data: The batches.
    """
    wanted = max((quantizer.samples for quantizer in quantizers), default=0)
    if not wanted:
        return
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        with torch.no_grad(), preserved_rng(data.loader):
            for batch, size in data.batches(wanted):
                with _observing([q for q in quantizers if seen < q.samples], silenced=quantizers):
                    data.call(model, batch)
                seen += size
    finally:
        for module, training in modes:
            module.training = training
    for quantizer in quantizers:
        if quantizer.samples:
            _set_range(quantizer)


def _set_range(quantizer: Calibrated) -> None:
    found = quantizer.statistics.finalize()
    module = quantizer.module
    if quantizer.planned.spec.signed is None:
        # As NNCF does: a grid needs values below zero as soon as one of the values is below zero.
        module.signed = bool((found.min < 0).any())
    shape = quantizer.planned.shape
    module.set_range(found.min.reshape(shape), found.max.reshape(shape))


@contextlib.contextmanager
def _observing(observed: list[Calibrated], silenced: Iterable[Calibrated] = ()) -> Iterator[None]:
    """Within the context the quantizers hand tensors on as they are; those that observe look at them."""
    members = {id(quantizer): quantizer for quantizer in [*observed, *silenced]}
    looking = {id(quantizer) for quantizer in observed}
    try:
        for key, quantizer in members.items():
            quantizer.module.observer = quantizer.statistics.update if key in looking else _look_away
        yield
    finally:
        for quantizer in members.values():
            quantizer.module.observer = None


def _look_away(tensor: torch.Tensor) -> None:
    """Lets a tensor pass."""
