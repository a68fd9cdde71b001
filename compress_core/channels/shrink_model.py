"""Removes channels from a model in place, from its transforms, its optimizer and its averaged copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress_core.channels.algebra import Role
from compress_core.channels.following import declared_tensors
from compress_core.channels.groups import ChannelGroup, Member, channel_groups
from compress_core.channels.inputs import InputSpec, example_arguments
from compress_core.channels.proof import Certificate, prove
from compress_core.channels.shrinking import Shrinkage, shrinkage
from compress_core.errors import StateError, UsageError
from compress_core.trace import Example, trace
from compress_core.transforms.model_wide import bypass_transforms
from compress_core.transforms.snapshot import ModelSnapshot
from compress_core.transforms.weight_chain import WeightChain


def shrink_model(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, set[int]]], specs: Sequence[InputSpec]
) -> tuple[Shrinkage, Certificate]:
    """Removes channels from a model in place, together with their transforms of weights and activations.

    The channels must be masked: the weights that produce and that read them. Parameters and buffers stay the same
    objects.

    Args:
        model: The model.
        groups: Groups with the indices of the channels to remove.
        specs: The inputs of the forward.

    Returns:
        Which indices of which tensors stay, and how well the smaller model agrees with the masked one.

    Raises:
        ShrinkError: The smaller model would fail or compute something else, or a transform does not declare how it
            follows. The model is not changed.
    """
    found, certificate = planned_shrinkage(model, groups, specs)
    apply_all_or_nothing(found, model)
    return found, certificate


def planned_shrinkage(
    model: nn.Module, groups: Sequence[tuple[ChannelGroup, set[int]]], specs: Sequence[InputSpec]
) -> tuple[Shrinkage, Certificate]:
    """Returns what `shrink_model` would do, verified on a copy; arguments and errors are the same."""
    chosen = [group for group, gone in groups if gone]
    extended = _with_activation_transforms(model, chosen, specs)
    found = shrinkage(model, list(zip(extended, [gone for _, gone in groups if gone], strict=True)))
    found = found.with_weight_transforms(model)
    return found, prove(model, found, specs)


def apply_all_or_nothing(found: Shrinkage, model: nn.Module) -> None:
    """Applies a shrinkage; if that fails, the model is restored.

    Raises:
        StateError: The shrinkage was made for another model.
    """
    snapshot = ModelSnapshot(model)
    try:
        found.apply(model)
    except BaseException:
        snapshot.restore()
        raise


def load_compressed_model(model: nn.Module, state_dict: Mapping[str, Any], plan: Mapping[str, Any]) -> nn.Module:
    """Shrinks an uncompressed model as `strip` did, and loads the weights of the stripped model.

    Args:
        model: The model as it was before compression, of the user's own class; it is changed in place.
        state_dict: The stripped model's `state_dict()`.
        plan: What `controller.shrink_plan` returned; JSON-able.

    Returns:
        The model that was given.

    Raises:
        StateError: Plan, weights and model do not fit together; the model is not changed.
    """
    snapshot = ModelSnapshot(model)
    try:
        Shrinkage.from_dict(plan).apply(model)
        try:
            model.load_state_dict(state_dict)
        except (RuntimeError, TypeError, AttributeError) as error:  # the others: not a state_dict at all
            raise StateError(f"the weights do not fit the model that the plan leaves: {error}") from error
    except BaseException:
        snapshot.restore()
        raise
    return model


# Activation transforms, such as quantizers with a scale for each channel.


def _with_activation_transforms(
    model: nn.Module, groups: Sequence[ChannelGroup], specs: Sequence[InputSpec]
) -> list[ChannelGroup]:
    """Adds to the groups the tensors of activation transforms, found with a trace that includes the transforms."""
    declared = declared_tensors(model) if groups else {}
    if not declared:
        return list(groups)
    device = next((parameter.device for parameter in model.parameters()), None)
    args, kwargs = example_arguments(specs, device, None, small=False)
    with bypass_transforms(model, WeightChain):
        whole_heads = frozenset(name for group in groups for name in group.whole_heads)
        algebra = channel_groups(trace(model, Example.of(*args, **kwargs)), whole_heads).algebra
    classes = algebra.classes()
    extended = []
    for group in groups:
        channel_of = _channels_by_class(group, algebra.parameters, classes)
        members = []
        for name, tensor in declared.items():
            for dim, labels in enumerate(algebra.parameters.get(name, [])):
                channels = np.array([channel_of.get(number, -1) for number in classes[labels].tolist()], np.int64)
                if (channels >= 0).any():
                    tensor.check_found(dim)
                    members.append(Member(name, dim, channels))
        extended.append(replace(group, members=(*group.members, *members)))
    return extended


def _channels_by_class(
    group: ChannelGroup, parameters: Mapping[str, list[np.ndarray]], classes: np.ndarray
) -> dict[int, int]:
    maker = next(member for member in group.members if member.role == Role.MAKES)
    numbers = classes[parameters[maker.parameter][maker.dim]].tolist()
    return {number: channel for number, channel in zip(numbers, maker.channels.tolist(), strict=True) if channel >= 0}


# Optimizers and averages.


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, found: Shrinkage) -> None:
    """Refuses an optimizer whose state has other shapes than the parameters.

    Raises:
        UsageError: Names the parameter; nothing has been changed.
    """
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if name in found.kept else {}
        for key, value in state.items():
            fits = not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape
            if not fits or isinstance(value, (list, tuple, dict)):
                raise UsageError(
                    f"{type(optimizer).__name__} keeps '{key}' of another shape than the parameter '{name}', so it "
                    "cannot be made smaller with it; shrink before training begins, or use another optimizer"
                )


def shrink_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, found: Shrinkage) -> None:
    """Slices the optimizer's state of each element (momentum, moments); call it after shrinking the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in found.kept:
                continue
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[key] = found.slice(name, value).contiguous()


def averaged_module(ema: nn.Module, found: Shrinkage) -> nn.Module:
    """Returns the copy of the model inside an average of its weights, after checking it.

    Raises:
        UsageError: `ema` is not a copy of the model; nothing has been changed.
    """
    module = ema.module if isinstance(ema, AveragedModel) else ema
    try:
        found.check(module)
    except StateError as error:
        raise UsageError(f"ema must be a copy of the compressed model, or an AveragedModel of it: {error}") from error
    return module
