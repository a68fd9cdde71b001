"""What the processes of a training have to have in common, before and after a model is compressed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.data import ranks
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.state import plain_config
from compress_core.transforms.sharded import is_sharded, sharded_error

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def same_start(model: nn.Module, lifecycle: Lifecycle, state: Mapping[str, Any] | None) -> Iterator[None]:
    """Context manager in which all processes have the same model and config; it does nothing in a single one.

    Processes that do not compress the same model in the same way are refused. Buffers are set to those of rank 0, as
    DistributedDataParallel does before each forward: behind the last one, running statistics differ. If the context
    fails, they are as before.

    Args:
        model: The model; where a state is resumed its weights are not compared, because they are loaded later.
        lifecycle: Its algorithms.
        state: The compression state that is resumed.

    Raises:
        RankError: On all processes; the message says what differs.
    """
    if ranks.number_of_ranks() == 1:
        yield
        return
    configs = {a.name: _hash(plain_config(a.config)) for a in lifecycle.algorithms}
    ranks.require_same("configs", configs, "give all ranks the same config")
    if state is not None:
        ranks.require_same("compression states", {"state": _hash(state)}, "give all ranks the same compression_state")
        yield
        return
    weights = {name: ranks.fingerprint(parameter) for name, parameter in model.named_parameters()}
    ranks.require_same(
        "weights",
        weights,
        "load the same weights on all ranks, or seed them alike, before create_compressed_model",
    )
    buffers = dict(model.named_buffers())
    before = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    try:
        ranks.take_first("buffers", buffers)
        yield
    except BaseException:
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(before[name])
        raise


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


def refuse_sharded(model: nn.Module) -> None:
    """Refuses a model of whose parameters this process has parts only.

    Raises:
        ModelError: A parameter is sharded.
    """
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise sharded_error(sharded)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _hash(value: Any) -> str:
    return ranks.fingerprint([json.dumps(value, sort_keys=True, default=repr)])
