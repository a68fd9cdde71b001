"""Runs the teacher, and tells teachers apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compress_core import Batch
from compress_core.data.structures import copied

# Of each tensor so many evenly spaced elements count for the mark of a teacher.
_ELEMENTS = 1024


def run_teacher(teacher: nn.Module, batch: Batch, layers: Iterable[str]) -> tuple[Any, Mapping[str, list[Any]]]:
    """Returns what the teacher and layers of it return for the arguments of a batch.

    Args:
        teacher: The teacher, in eval mode.
        batch: The arguments.
        layers: Dotted names of layers.

    Returns:
        The outputs; and by name of a layer what it returned, for each of its calls.
    """
    found: dict[str, list[Any]] = {name: [] for name in layers}
    handles = [teacher.get_submodule(name).register_forward_hook(_kept_in(calls)) for name, calls in found.items()]
    try:
        with torch.no_grad():
            return teacher(*batch.args, **batch.kwargs), found
    except Exception as error:
        error.add_note("This was raised by the teacher, which was called with the arguments of the compressed model.")
        raise
    finally:
        for handle in handles:
            handle.remove()


def _kept_in(calls: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, outputs: Any) -> None:
        calls.append(copied(outputs))  # what comes behind the layer may write to them

    return keep


def fingerprint(teacher: nn.Module) -> str:
    """Returns a mark of a teacher's weights: equal for equal ones, on any device; evenly spaced elements count."""
    digest = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ''}".encode())
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            flat = (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach().reshape(-1)
            chosen = flat[:: max(1, flat.numel() // _ELEMENTS)].cpu().contiguous()
            digest.update(chosen.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
