"""Measures forwards of a model and of one with fewer channels, in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from compress_core.channels import ChannelGroup, InputSpec, example_arguments, shrink_model, shrinkage
from compress_core.data.rng import preserved_rng
from compress_core.transforms import bake_transforms
from compress_core.transforms.python_state import copied
from compress_filter_pruning.statistics import Latency

_WARM_UP = 3

Pairs = Sequence[tuple[ChannelGroup, set[int]]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def measured_latency(model: nn.Module, groups: Pairs, specs: Sequence[InputSpec], rounds: int) -> Latency:
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
    with quiet(model, specs) as inputs:
        times = in_turns([masked, shrunk], inputs, rounds, clock(device_of(model)))
    medians = [statistics.median(found) for found in times]
    return Latency(medians[0], medians[1], torch.get_num_threads())


def smaller(model: nn.Module, groups: Pairs) -> nn.Module:
    """Returns a copy in eval mode, without the channels; whether they can go was tried before."""
    found = copied(model).eval()
    bake_transforms(found)
    if any(gone for _, gone in groups):
        shrinkage(found, groups).apply(found)
    return found


def clock(device: torch.device) -> Callable[[], float]:
    """Returns the clock to measure with: of a single thread on the CPU its own time, which others do not disturb."""
    own = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if own else time.perf_counter


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def quiet(model: nn.Module, specs: Sequence[InputSpec]) -> Iterator[Inputs]:
    """Within the context no gradient is recorded, and at its end all generators are as before; yields the inputs."""
    with preserved_rng(), torch.no_grad():
        yield example_arguments(specs, device_of(model), None, small=False)


def in_turns(models: Sequence[nn.Module], inputs: Inputs, rounds: int, now: Callable[[], float]) -> list[list[float]]:
    """Returns the seconds of each forward of each model, which are measured alternately."""
    device = device_of(models[0])
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + _WARM_UP):
        for entry, found in zip(models, times, strict=True):
            finish(device)
            started = now()
            entry(*inputs[0], **inputs[1])
            finish(device)
            if number >= _WARM_UP:
                found.append(now() - started)
    return times


def typical(seconds: Sequence[float]) -> float:
    """Returns the first quartile of times: what else a machine does makes them longer, and never shorter."""
    return sorted(seconds)[len(seconds) // 4]


def finish(device: torch.device) -> None:
    """Waits until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
