"""Checks that a compressed model computes finite values where the uncompressed model does.

A rounded divisor can become zero and a rounded exponent too large, so that a model returns NaN from its creation on.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress_core.contract.context import Context
from compress_core.data.examples import Example
from compress_core.data.memory import refuse_out_of_memory
from compress_core.errors import ModelError
from compress_core.trace.graph import tensors_with_paths
from compress_core.trace.isolation import Untouched
from compress_core.transforms.activation import activation_transforms
from compress_core.transforms.model_wide import bypass_transforms, evaluating

logger = logging.getLogger(__name__)


def check_finite(model: nn.Module, context: Context) -> None:
    """Refuses a compressed model whose outputs are not finite where those of the uncompressed model are.

    It costs one forward in eval mode, on a batch that has been read already, unless something is wrong. If no algorithm
    has read one, or the model fails, nothing is checked.

    Args:
        model: The compressed model; nothing in it is changed.
        context: Provides the data.

    Raises:
        ModelError: An output is not finite; the message names the module or transform where this begins.
    """
    example = context.take_example()
    if example is None:
        return
    try:
        place = _broken_place(model, example, bypassable=context.bypassable)
    except Exception as error:  # a model of the user's may fail in any way
        refuse_out_of_memory(error)
        logger.debug("not checked whether outputs are finite: %s", error)
        return
    if place is not None:
        raise ModelError(
            f"the compressed model returns values that are not finite on {example.source}, and the uncompressed model "
            f"does not; they begin in {place}. Name it in ignored_scopes, or give calibration data that resembles this "
            "batch"
        )


def _broken_place(model: nn.Module, example: Example, *, bypassable: bool) -> str | None:
    """Returns where values begin that are not finite, or None if outputs are as finite as before."""
    with Untouched(model, values=True), evaluating(model):
        if _is_finite(model, example):
            return None
        with bypass_transforms(model):
            was_finite = _is_finite(model, example)
        if was_finite:
            return _beginning(model, example)
    if not bypassable:
        logger.warning("the compressed model returns values that are not finite on %s", example.source)
    return None


def _is_finite(model: nn.Module, example: Example) -> bool:
    return all(is_finite for _, is_finite in _record({"": model}, model, example))


def _beginning(model: nn.Module, example: Example) -> str:
    """Returns the first module or transform whose results are not finite, unless they were so before."""
    transforms = {id(handle.transform): handle for handle in activation_transforms(model)}
    labels = {}
    for name, module in model.named_modules():
        handle = transforms.get(id(module))
        label = f"'{name}' ({type(module).__name__})"
        labels[label if handle is None else f"what '{handle.key}' makes of '{handle.place}'"] = module
    with bypass_transforms(model):
        before = dict(_record(labels, model, example))
    after = _record(labels, model, example)
    return next(run[0] for run, is_finite in after if not is_finite and before.get(run, True))


def _record(modules: Mapping[str, nn.Module], model: nn.Module, example: Example) -> list[tuple[tuple[str, int], bool]]:
    """Returns, in the order of the forward, (label, number) of each run of the modules, and whether it was finite."""
    turns: Counter[str] = Counter()
    found: list[tuple[tuple[str, int], bool]] = []

    def note(label: str, output: Any) -> None:
        found.append(((label, turns[label]), _all_finite(output)))
        turns[label] += 1

    with contextlib.ExitStack() as stack:
        for label, module in modules.items():
            handle = module.register_forward_hook(lambda _module, _args, output, label=label: note(label, output))
            stack.callback(handle.remove)
        example.run(model, example.batch)
    return found


def _all_finite(output: Any) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for _, tensor in tensors_with_paths(output)
        if tensor.is_floating_point() or tensor.is_complex()
    )
