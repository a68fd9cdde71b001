"""`compression_lr_multiplier`: a factor on what the parameters learn that algorithms add.

It acts in one of two ways. As long as nobody has asked for parameter groups, transforms multiply the gradients of their
parameters, as in NNCF. Optimizers that divide by the size of gradients undo that. `parameter_groups` sets the learning
rates instead, which acts with every optimizer, and switches the factor on gradients off, so that it does not act twice.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.context import Context
from compress_core.errors import ConfigError, UsageError
from compress_core.transforms.model_wide import transforms_by_key

logger = logging.getLogger(__name__)

KEY = "compression_lr_multiplier"

# Optimizers, of torch and of other libraries, whose step stays nearly the same when all gradients are multiplied.
_SCALE_FREE = re.compile(
    r"adam|adagrad|adadelta|adafactor|adabelief|rmsprop|rprop|lion|lamb|lars|novograd|sophia|muon|prodigy|shampoo|soap"
)
_REMEDY = "give the optimizer controller.parameter_groups(lr) instead of model.parameters()"


def apply_multiplier(algorithm: Algorithm, context: Context, added: Iterable[tuple[str, nn.Module]]) -> None:
    """Tells the transforms that an algorithm has added by what they multiply the gradients of their parameters.

    Args:
        algorithm: The algorithm.
        context: Its context.
        added: Name of the place, and the transform.

    Raises:
        ConfigError: There is a factor, and the algorithm learns something and would silently ignore it.
    """
    learning = [(name, module) for name, module in added if any(True for _ in module.parameters())]
    if not learning:
        return
    factor = context.lr_multiplier(algorithm)
    if factor == 1.0:
        return
    if not algorithm.applies_lr_multiplier:
        raise ConfigError(
            f"'{algorithm.name}' learns something (at '{learning[0][0]}') and does not apply this factor. Remove it, "
            "or set it in the sections of those that do; a plugin that does declares applies_lr_multiplier = True",
            path=KEY,
        )
    for _, module in learning:
        set_multiplier(module, factor)


def set_multiplier(transform: nn.Module, factor: float) -> None:
    """Sets the factor of a transform, which reads it in each forward."""
    transform.__dict__["lr_multiplier"] = factor


def warn_if_nothing_learns(algorithms: Iterable[Algorithm], context: Context, model: nn.Module) -> None:
    """Logs a warning for each factor in the config that no parameter is there for."""
    learned = _learned(model)
    factors = {a.name: getattr(a.config.unread(), KEY, None) for a in algorithms}
    idle = [name for name, own in factors.items() if own not in (None, 1.0) and not learned.get(name)]
    for name in idle:
        logger.warning("config: %s of '%s' can have no effect: the algorithm adds nothing that learns", KEY, name)
    given = context.config.root.__dict__[KEY]
    if given not in (None, 1.0) and not any(learned.get(name) for name, own in factors.items() if own is None):
        logger.warning("config: %s can have no effect: no algorithm of this config adds anything that learns", KEY)


def _learned(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Returns the parameters of transforms by the key of the transform, which is the algorithm's name; each once."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for _, key, transform in transforms_by_key(model).values():
        fresh = [parameter for parameter in transform.parameters() if id(parameter) not in seen]
        seen.update(map(id, fresh))
        found.setdefault(key, []).extend(fresh)
    return {key: parameters for key, parameters in found.items() if parameters}


def parameter_groups(
    model: nn.Module,
    algorithms: Mapping[str, Algorithm],
    context: Context,
    lr: float,
    *,
    weight_decay: float | None,
    compression_weight_decay: float | None,
) -> list[dict[str, Any]]:
    """See `CompressionController.parameter_groups`."""
    _check("lr", lr)
    for name, value in (("weight_decay", weight_decay), ("compression_weight_decay", compression_weight_decay)):
        if value is not None:
            _check(name, value)
    learned = _learned(model)
    others = {id(parameter) for parameters in learned.values() for parameter in parameters}
    own = [parameter for parameter in model.parameters() if id(parameter) not in others]
    groups = [_group("model", own, lr, weight_decay)] if own else []
    decay = weight_decay if compression_weight_decay is None else compression_weight_decay
    for key, parameters in learned.items():
        factor = context.lr_multiplier(algorithms[key]) if key in algorithms else 1.0
        groups.append(_group(key, parameters, lr * factor, decay))
    for _, _, transform in transforms_by_key(model).values():
        if _multiplier(transform) != 1.0:
            set_multiplier(transform, 1.0)
    return groups


def _group(name: str, parameters: list[nn.Parameter], lr: float, decay: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "lr": lr, "name": name}
    return group if decay is None else {**group, "weight_decay": decay}


def _check(name: str, value: Any) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not fine:
        raise UsageError(f"parameter_groups(): {name} must be a number from 0 on, got {value!r}")


def _multiplier(transform: nn.Module) -> float:
    return float(getattr(transform, "lr_multiplier", 1.0))


def check_optimizers(model: nn.Module, given: Iterable[object]) -> bool:
    """Returns whether a factor on gradients has (nearly) no effect with one of these optimizers, and logs a warning.

    Args:
        model: The compressed model.
        given: Optimizers, of torch or of libraries that are made like them; other objects are left alone.
    """
    scaled = {
        id(parameter): place
        for place, _, transform in transforms_by_key(model).values()
        if _multiplier(transform) != 1.0
        for parameter in transform.parameters()
    }
    for optimizer in given:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimizers
        groups = getattr(inner, "param_groups", None)
        if not scaled or not isinstance(groups, list) or not _is_scale_free(inner):
            continue
        found = next((scaled[id(p)] for g in groups for p in g["params"] if id(p) in scaled), None)
        if found is not None:
            logger.warning(
                "%s multiplies the gradients of what algorithms learn (such as at '%s'), and %s takes nearly the same "
                "steps whatever the size of gradients: it has no effect. For learning rates of their own, %s",
                *(KEY, found, type(inner).__name__, _REMEDY),
            )
            return True
    return False


def _is_scale_free(optimizer: Any) -> bool:
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__ if cls not in (object, torch.optim.Optimizer)]
    return any(_SCALE_FREE.search(name) for name in names)
