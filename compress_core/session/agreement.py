"""What the processes of a training have to have in common, before and after a model is compressed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress_core.data import ranks
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.state import plain_config

logger = logging.getLogger(__name__)


def require_same_start(model: nn.Module, lifecycle: Lifecycle, state: Mapping[str, Any] | None) -> None:
    """Refuses processes that do not compress the same model in the same way; does nothing in a single one.

    Args:
        model: The model; where a state is resumed its weights are not compared, because they are loaded later.
        lifecycle: Its algorithms.
        state: The compression state that is resumed.

    Raises:
        RankError: On all processes; the message says what differs.
    """
    if ranks.number_of_ranks() == 1:
        return
    configs = {a.name: _hash(plain_config(a.config)) for a in lifecycle.algorithms}
    ranks.require_same("configs", configs, "give all ranks the same config")
    if state is not None:
        ranks.require_same("compression states", {"state": _hash(state)}, "give all ranks the same compression_state")
        return
    weights = {name: ranks.fingerprint(tensor) for name, tensor in _tensors(model).items()}
    ranks.require_same(
        "weights",
        weights,
        "load the same weights on all ranks, or seed them alike, before create_compressed_model",
    )


def agree(model: nn.Module, lifecycle: Lifecycle) -> None:
    """Makes sure that all processes have the same model at the end; does nothing in a single one.

    Plans and states have to be the same. Tensors in which roundings differ are set to those of rank 0.

    Raises:
        RankError: On all processes; the message says what differs.
    """
    if ranks.number_of_ranks() == 1:
        return
    plans = {name: _hash(plan.to_dict()) for name, plan in lifecycle.plans.items()}
    ranks.require_same("plans", plans, "use the same versions of all packages, and data that takes the same branches")
    changed = ranks.take_first("tensors of the compressed model", _tensors(model))
    if changed:
        logger.info("%d tensors, such as '%s', are those of rank 0: others were rounded", len(changed), changed[0])
    states = {name: _hash(dict(state)) for name, state in lifecycle.state(model).items()}
    ranks.require_same("states of algorithms", states, "use the same versions of all packages")


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _hash(value: Any) -> str:
    return ranks.fingerprint([json.dumps(value, sort_keys=True, default=repr)])
