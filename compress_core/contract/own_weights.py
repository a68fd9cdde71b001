"""Weights of layers of a user's own: found by what the model computes, and not by the class of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from compress_core.contract.algorithm import Plan
from compress_core.contract.kept_trace import KeptTrace
from compress_core.contract.stages import Stage
from compress_core.errors import CompressionError, TransformError
from compress_core.trace import Trace
from compress_core.trace.weights import WeightUse, find_weights
from compress_core.transforms import WeightTransform, add_weight_transform
from compress_core.transforms.layers import WeightedLayer, WeightTensor, own_parameters

_UNREACHED = "no example input reaches it"


def own_weights(
    model: nn.Module, traced: Callable[[], Trace], plain: Callable[[], Trace | None], kept: KeptTrace
) -> dict[str, WeightUse]:
    """Returns the weights of layers of a user's own, and parameters of which nothing can be said.

    The model is traced if it has any such parameter. Meanwhile these have a transform without effect, which shows
    whether a transform reaches what the model computes with.

    Args:
        model: The model; it is as before afterwards.
        traced: Returns a trace of it.
        plain: Returns a trace of it without transforms, if there is one. That is enough where it shows that all of
            these parameters are used, and none of them as a weight (positions, tokens, scales).
        kept: Keeps what is found for the next algorithm.
    """
    names = own_parameters(model)
    if not names:
        return {}
    known = kept.own_weights_of(model)
    if known is not None:
        return known
    with contextlib.suppress(CompressionError):  # `traced` fails likewise
        shown = plain()
        if shown is not None and _has_no_weight(shown, names):
            return {}
    with _probes(model, names) as refused:
        try:
            trace = traced()
        except CompressionError as error:
            reason = f"whether it is a weight is not known, as there is no trace of the model: {error}"
            return {name: WeightUse(name, None, "linear", reason) for name in names}
    found = find_weights(trace, probed=set(names) - set(refused)).uses
    seen = _seen(trace)
    uses = {}
    for name in names:
        if name not in seen:
            uses[name] = WeightUse(name, None, "linear", _UNREACHED)
        elif name in found:
            uses[name] = replace(found[name], obstacle=found[name].obstacle or refused.get(name, ""))
    kept.keep_own_weights(model, trace, uses)
    return uses


def _has_no_weight(trace: Trace, names: Iterable[str]) -> bool:
    return _seen(trace).issuperset(names) and find_weights(trace).uses.keys().isdisjoint(names)


def _seen(trace: Trace) -> set[str]:
    """Returns the names of the parameters that operators read in a forward."""
    forwards = [*trace.forwards, *(forward for forward in trace.training if forward is not None)]
    return {value.parameter for forward in forwards for value in forward.values}


def resumed_uses(model: nn.Module, plan: Plan) -> dict[str, WeightUse]:
    """Returns the weights of layers of a user's own that a saved plan names, for a model that cannot be traced."""
    targets = {name: WeightUse(name, None, "linear") for name in own_parameters(model) if name in plan.targets}
    skipped = {name: WeightUse(name, None, "linear", plan.skipped[name]) for name in plan.skipped}
    return targets | {name: use for name, use in skipped.items() if name in own_parameters(model)}


def as_tensors(model: nn.Module, uses: Mapping[str, WeightUse]) -> list[WeightTensor]:
    """Returns the weights as `weight_tensors` returns those of known layers."""
    places, parameters = own_parameters(model), dict(model.named_parameters())
    return [
        WeightTensor(
            name, places[name], WeightedLayer((), use.channel_dim, use.operator), parameters[name], use.obstacle
        )
        for name, use in uses.items()
    ]


class _Probe(WeightTransform):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.view_as(weight)


@contextlib.contextmanager
def _probes(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, str]]:
    """Context manager in which parameters have a transform without effect; gives name -> why it cannot have one."""
    refused, handles = {}, []
    try:
        for name in names:
            try:
                handles.append(add_weight_transform(model, name, _Probe(), stage=Stage.PRECISION, key="probe"))
            except TransformError as error:
                refused[name] = str(error)
        yield refused
    finally:
        for handle in reversed(handles):
            handle.remove()
