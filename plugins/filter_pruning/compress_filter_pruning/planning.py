"""Chooses the groups of channels to prune, and records why the others are not pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.channels import (
    ChannelGroup,
    ChannelGroups,
    Costs,
    InputSpec,
    Role,
    batch_size,
    channel_groups_of_heads,
    input_specs,
    operation_costs,
    parameter_costs,
    removable_groups,
)
from compress_core.torch_internals import AnyConv, AnyConvTranspose
from compress_core.trace import Example, Trace
from compress_core.trace.graph import ForwardTrace, Operator, Ref
from compress_filter_pruning.config import FilterPruningParams
from compress_filter_pruning.groups import PruningGroup
from compress_filter_pruning.latency_model import LatencyModel

_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "embedding", "mv")
_VIEWS = ("t", "transpose", "permute", "view", "reshape", "detach", "expand", "_to_copy", "unsqueeze", "squeeze")


@dataclass(frozen=True)
class PruningPlan:
    """The groups to prune, and the costs of the model.

    Attributes:
        groups: The groups.
        skipped: Name of a weight -> why its filters are not pruned.
        operations: Floating point operations for one sample.
        parameters: Number of parameters.
        inputs: The inputs of the forward.
        latency: The measured time of a forward; None unless the target counts it.
    """

    groups: list[PruningGroup]
    skipped: dict[str, str]
    operations: Costs
    parameters: Costs
    inputs: list[InputSpec]
    latency: LatencyModel | None = None

    def costs(self, target_key: str) -> Costs | LatencyModel:
        """Returns what levels are shares of; floating point operations if these are channels."""
        if target_key == "pruning_latency_target":
            assert self.latency is not None, "the latency was not measured"
            return self.latency
        return self.parameters if target_key == "pruning_parameters_target" else self.operations

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-able dict, without `skipped`."""
        return {
            "groups": [group.to_dict() for group in self.groups],
            "operations": self.operations.to_dict(),
            "parameters": self.parameters.to_dict(),
            "inputs": [spec.to_dict() for spec in self.inputs],
        } | ({} if self.latency is None else {"latency": self.latency.to_dict()})


def make_plan(
    model: nn.Module,
    trace: Trace,
    params: FilterPruningParams,
    targets: Iterable[str],
    excluded: Mapping[str, str],
    example: Example | None = None,
) -> PruningPlan:
    """Chooses the groups that can be pruned.

    Args:
        model: The model; it is not changed.
        trace: The trace of the model.
        params: The settings.
        targets: Names of the weights that the scopes allow.
        excluded: Name of a weight that the scopes exclude -> the reason.
        example: Inputs for comparing the model with smaller ones; random ones by default.
    """
    specs = input_specs(trace.forwards[0], model, example)
    found = channel_groups_of_heads(model, trace, specs)
    targets = set(targets)
    rules = _Rules(model, trace, params, targets, excluded)
    candidates, skipped = [], dict(excluded)
    for group in found.groups:
        makers = [m.parameter for m in group.members if m.role == Role.MAKES]
        if not makers:
            continue
        reason = rules.reason_to_leave(group, makers)
        if reason is None:
            candidates.append(group)
        else:
            for name in makers:
                skipped.setdefault(name, reason)
    chosen, broken = removable_groups(model, candidates, specs)
    for group, reason in broken:
        for member in group.members:
            if member.role == Role.MAKES:
                skipped.setdefault(member.parameter, reason)
    _add_weights_without_channels(skipped, found, targets)
    groups = [_pruning_group(number, group, params.multiple_of) for number, group in enumerate(chosen)]
    pruned = {member.parameter for group in groups for member in group.makers}
    return PruningPlan(
        groups,
        {name: reason for name, reason in skipped.items() if name not in pruned},
        operation_costs(found, chosen, batch_size(specs)),
        parameter_costs(model, chosen),
        specs,
    )


def _add_weights_without_channels(skipped: dict[str, str], found: ChannelGroups, targets: Iterable[str]) -> None:
    """Gives a reason to weights of which no rule says that they make channels: each is pruned, or has a reason."""
    made = {member.parameter for group in found.groups for member in group.members if member.role == Role.MAKES}
    reasons = {
        member.parameter: str(group.obstacle)
        for group in found.groups
        if group.obstacle is not None
        for member in group.members
    }
    for name in targets:
        if name not in made:
            skipped.setdefault(name, reasons.get(name, "no example input reaches it"))


def _pruning_group(number: int, group: ChannelGroup, multiple_of: int) -> PruningGroup:
    makers = [member for member in group.members if member.role == Role.MAKES]
    # A channel may have several filters in a layer (one in each group of the convolution).
    filters = min(int((member.channels >= 0).sum()) // group.size for member in makers)
    step = multiple_of // math.gcd(multiple_of, filters)
    return PruningGroup(number, makers[0].parameter, group, group.size, step)


RANKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be pruned; others do not have the operators for it."""


class _Rules:
    """Decides, from the settings and the model, whether a group may be pruned."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        params: FilterPruningParams,
        targets: set[str],
        excluded: Mapping[str, str],
    ) -> None:
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters())
        self._params, self._targets, self._excluded = params, targets, excluded
        self._first = first_convolutions(trace)

    def reason_to_leave(self, group: ChannelGroup, makers: Sequence[str]) -> str | None:
        """Returns why a group is left whole; None if it can be pruned."""
        if group.obstacle is not None or group.size < 2:
            return "has a single channel" if group.obstacle is None else str(group.obstacle)
        for name in (member.parameter for member in group.members if member.parameter in self._parameters):
            if (dtype := self._parameters[name].dtype) not in RANKED_DTYPES:
                return f"'{name}' has the dtype {dtype}, whose values cannot be ranked and masked"
        for name in makers:
            if name in self._excluded:
                return self._excluded[name] if len(makers) == 1 else f"tied to '{name}': {self._excluded[name]}"
            if (reason := self._reason(name)) is not None:
                return f"'{name}' {reason}"
        if not any(name in self._targets for name in makers):
            return "no layer makes these channels"
        return None

    def _reason(self, name: str) -> str | None:
        if ".parametrizations." in name:
            return "is computed by a parametrization"
        layer = self._modules.get(name.rpartition(".")[0])
        if name in self._first and not self._params.prunes_first:
            return "is a first convolution (prune_first_conv is false)"
        strided = isinstance(layer, AnyConv) and not isinstance(layer, AnyConvTranspose) and max(layer.stride) > 1
        if strided and not self._params.prunes_downsampling:
            return "has a stride (prune_downsample_convs is false)"
        return None


def first_convolutions(trace: Trace) -> set[str]:
    """Returns the names of the weights of convolutions that an input of the model reaches before any other weight."""
    return {name for forward in trace.forwards for name in _first_in(forward)}


def _first_in(forward: ForwardTrace) -> Iterable[str]:
    fresh = {value.index for value in forward.inputs}
    weights = {value.index for value in forward.values if value.parameter and len(value.shape) > 1}
    for operator in forward.operators:
        kind = operator.name.split(".")[1]
        if kind in _VIEWS and operator.inputs and operator.inputs[0] in weights:
            weights.update(index for _, index in operator.outputs)
        weight = _weight_of(operator, kind)
        if kind == "convolution" and operator.inputs and operator.inputs[0] in fresh and weight is not None:
            yield forward.values[weight].parameter
        if kind in _PRODUCTS and any(index in weights for index in operator.inputs):
            continue
        if any(index in fresh for index in operator.inputs):
            fresh.update(index for _, index in operator.outputs)


def _weight_of(operator: Operator, kind: str) -> int | None:
    if kind != "convolution" or not isinstance(operator.arguments[1], Ref):
        return None
    return operator.arguments[1].value
