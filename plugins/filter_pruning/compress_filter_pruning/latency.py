"""Measures the time of a forward of the masked model and of the model without the masked channels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from compress_core.channels import ChannelGroup, InputSpec, example_arguments, shrink_model
from compress_core.data.rng import preserved_rng
from compress_core.transforms import bake_transforms
from compress_core.transforms.python_state import copied
from compress_filter_pruning.statistics import Latency

_WARM_UP = 3


def measured_latency(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, set[int]]], specs: Sequence[InputSpec], rounds: int
) -> Latency:
    """Measures copies of a model alternately, on inputs of the traced shapes.

    Args:
        model: The masked model; it is not changed.
        groups: Groups with their masked channels.
        specs: The inputs of the forward.
        rounds: Number of forwards of each model.
    """
    masked = copied(model).eval()
    bake_transforms(masked)
    shrunk = copied(masked)
    if any(gone for _, gone in groups):
        shrink_model(shrunk, groups, specs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    times: list[list[float]] = [[], []]
    with preserved_rng(), torch.no_grad():
        args, kwargs = example_arguments(specs, device, None, small=False)
        for number in range(rounds + _WARM_UP):
            for entry, found in zip((masked, shrunk), times, strict=True):
                _finish(device)
                started = time.perf_counter()
                entry(*args, **kwargs)
                _finish(device)
                if number >= _WARM_UP:
                    found.append(time.perf_counter() - started)
    medians = [statistics.median(found) for found in times]
    return Latency(medians[0], medians[1], torch.get_num_threads())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
