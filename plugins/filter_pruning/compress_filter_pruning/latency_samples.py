"""Measures how long each module takes with how many channels, and fits a `LatencyModel` to it.

As in NetAdapt (Yang et al. 2018, arXiv:1804.03230) and HALP (Shen et al. 2022, arXiv:2110.10811), times are measured
layer by layer on the machine and the real shapes, and the time of a network is their sum. Here no table holds every
width: smaller copies of the whole model run with widths drawn at random, and the time of each module is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_core.channels import Role
from compress_core.data.structures import tensors_of
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.latency import Inputs, clock, device_of, finish, in_turns, quiet, smaller, typical
from compress_filter_pruning.latency_model import LatencyModel, Part, features, fitted
from compress_filter_pruning.planning import PruningPlan

_COPIES = 12
_SECONDS = 0.2  # for the forwards of each copy
_ROUNDS = (3, 20)
_SEED = 0
# Narrower layers than this share of the channels are not measured; the fit goes on there.
_NARROWEST = 0.1


@dataclass
class _Stopwatch:
    """Adds up the time within each module, without that of the modules in it that are timed too."""

    now: Callable[[], float]
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    _open: list[list[float]] = field(default_factory=list)

    def watch(self, model: nn.Module, names: Sequence[str]) -> list[Any]:
        """Returns hooks on the modules; remove them at the end."""
        handles: list[Any] = []
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda *_: self._begin()))
            handles.append(module.register_forward_hook(lambda _, __, outputs, name=name: self._end(name, outputs)))
        return handles

    def _begin(self) -> None:
        finish(self.device)
        self._open.append([self.now(), 0.0])

    def _end(self, name: str, outputs: Any) -> None:
        finish(self.device)
        started, inner = self._open.pop()
        whole = self.now() - started
        if self._open:
            self._open[-1][1] += whole
        self.seconds[name] = self.seconds.get(name, 0.0) + whole - inner
        self.elements[name] = self.elements.get(name, 0) + sum(value.numel() for value in tensors_of(outputs))


@dataclass(frozen=True)
class _Timed:
    """A module that owns a pruned weight.

    Attributes:
        fixed, slopes: Its factors, see `Part`.
        output: Which factor its outputs grow with; None if they do not.
    """

    fixed: np.ndarray
    slopes: np.ndarray
    output: int | None


def fitted_model(model: nn.Module, plan: PruningPlan) -> LatencyModel:
    """Measures a model on its example inputs and returns how long it takes with how many channels.

    Args:
        model: The uncompressed model; it is not changed.
        plan: Its groups.
    """
    timed = _timed_modules(model, plan.groups)
    full = [group.full_size for group in plan.groups]
    device = device_of(model)
    now = clock(device)
    generator = np.random.default_rng(_SEED)
    whole = smaller(model, [])
    lefts, seconds = [np.array(full, np.float64)], []
    with quiet(model, plan.inputs) as inputs:
        once = typical(in_turns([whole], inputs, 3, now)[0])
        rounds = int(min(max(_SECONDS / max(once, 1e-9), _ROUNDS[0]), _ROUNDS[1]))
        first, elements = _measured(whole, whole, timed, inputs, rounds, now)
        seconds.append(first[0])
        for _ in range(_COPIES):
            left = [_drawn(group, generator) for group in plan.groups]
            pairs = [(g.channels, set(range(n, g.size))) for g, n in zip(plan.groups, left, strict=True)]
            (found, again), _ = _measured(smaller(model, pairs), whole, timed, inputs, rounds, now)
            # The machine may be slower for a while: as much as the full model is.
            pace = sum(first[0].values()) / max(sum(again.values()), 1e-12)
            lefts.append(np.array(left, np.float64))
            seconds.append({name: value * pace for name, value in found.items()})
    modules = {**timed, "": _rest(timed, elements, full)}
    return LatencyModel(tuple(_part(t, name, lefts, seconds) for name, t in modules.items()), tuple(full))


def _drawn(group: PruningGroup, generator: np.random.Generator) -> int:
    return group.rounded(int(np.ceil(group.full_size * generator.uniform(_NARROWEST, 1))))


def _part(timed: _Timed, name: str, lefts: Sequence[np.ndarray], seconds: Sequence[dict[str, float]]) -> Part:
    rows = np.stack([features(timed.fixed, timed.slopes, left) for left in lefts])
    return Part(timed.fixed, timed.slopes, fitted(rows, np.array([found.get(name, 0.0) for found in seconds])))


def _measured(
    small: nn.Module, whole: nn.Module, timed: dict[str, _Timed], inputs: Inputs, rounds: int, now: Callable[[], float]
) -> tuple[tuple[dict[str, float], dict[str, float]], dict[str, int]]:
    """Returns the typical seconds of each module, of both models in turns ('' is the rest), and elements of outputs."""
    device = device_of(whole)
    models = [small] if small is whole else [small, whole]
    found: list[list[dict[str, float]]] = [[] for _ in models]
    elements: dict[str, int] = {}
    for number in range(rounds + 2):
        for entry, times in zip(models, found, strict=True):
            stopwatch = _Stopwatch(now, device)
            handles = stopwatch.watch(entry, list(timed))
            try:
                total = _one_forward(entry, inputs, now)
            finally:
                for handle in handles:
                    handle.remove()
            elements = stopwatch.elements
            if number >= 2:
                times.append({**stopwatch.seconds, "": max(0.0, total - sum(stopwatch.seconds.values()))})
    usual = [{name: typical([times.get(name, 0.0) for times in entry]) for name in entry[0]} for entry in found]
    return (usual[0], usual[-1]), elements


def _one_forward(model: nn.Module, inputs: Inputs, now: Callable[[], float]) -> float:
    device = device_of(model)
    finish(device)
    started = now()
    model(*inputs[0], **inputs[1])
    finish(device)
    return now() - started


def _timed_modules(model: nn.Module, groups: Sequence[PruningGroup]) -> dict[str, _Timed]:
    """Returns the modules, but for the model itself, that own weights with pruned dimensions."""
    members: dict[str, dict[int, list[tuple[int, Any]]]] = {}
    for group in groups:
        for member in group.channels.members:
            members.setdefault(member.parameter, {}).setdefault(member.dim, []).append((group.number, member))
    sizes = {group.number: group.full_size for group in groups}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[str, str] = {}
    for name, dims in members.items():
        layer = name.rpartition(".")[0]
        if not layer or name not in parameters:
            continue
        key = (len(dims), parameters[name].numel())
        other = chosen.get(layer)
        if other is None or key > (len(members[other]), parameters[other].numel()):
            chosen[layer] = name
    return {layer: _timed(parameters[name], members[name], sizes) for layer, name in chosen.items()}


def _timed(weight: torch.Tensor, dims: dict[int, list[tuple[int, Any]]], sizes: dict[int, int]) -> _Timed:
    fixed: list[float] = []
    slopes: list[np.ndarray] = []
    output = None
    for dim in sorted(dims):
        length, row = weight.shape[dim], np.zeros(len(sizes))
        for number, member in dims[dim]:
            row[number] += int((member.channels >= 0).sum()) / sizes[number] / length
            if member.role != Role.READS:
                output = len(fixed)
        covered = sum(row[number] * sizes[number] for number in sizes)
        fixed.append(max(0.0, 1 - covered))
        slopes.append(row)
    return _Timed(np.array(fixed), np.array(slopes), output)


def _rest(timed: dict[str, _Timed], elements: dict[str, int], full: Sequence[int]) -> _Timed:
    """Returns what the time outside of all modules grows with: the elements of the outputs of modules."""
    fixed, row = 0.0, np.zeros(len(full))
    for name, entry in timed.items():
        count = elements.get(name, 0)
        if entry.output is None:
            fixed += count
        else:
            fixed += count * entry.fixed[entry.output]
            row += count * entry.slopes[entry.output]
    total = fixed + float(row @ np.array(full, np.float64))
    if not total:
        return _Timed(np.zeros(1), np.full((1, len(full)), 1 / sum(full)), None)
    return _Timed(np.array([fixed / total]), row[None] / total, None)
