"""Brings tensors of the student and of the teacher together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress_core import ModelError
from compress_knowledge_distillation.config import FeaturePair
from compress_knowledge_distillation.layers import LayerPair
from compress_knowledge_distillation.tensors import by_path, shown


@dataclass(frozen=True)
class Matched:
    """Two tensors that are compared.

    Attributes:
        what: What they are, for statistics and messages.
        student: The tensor that learns, with its graph.
        teacher: The tensor that it learns from.
    """

    what: str
    student: torch.Tensor
    teacher: torch.Tensor


def matched_outputs(student: Any, teacher: Any, asked: Mapping[str, str]) -> tuple[list[Matched], list[str]]:
    """Returns the pairs of outputs, and remarks on outputs that are left out.

    Args:
        student: What the compressed model returned.
        teacher: What the teacher returned.
        asked: Paths that the config pairs; if empty, outputs with the same path belong together.

    Raises:
        ModelError: A path that the config names is missing, or no output has a partner.
    """
    own, others = by_path(student), by_path(teacher)
    if asked:
        return [_asked(own, others, *paths) for paths in asked.items()], []
    # A scalar is a loss that the model computes itself, and no prediction.
    learning = {path: tensor for path, tensor in own.items() if tensor.requires_grad and tensor.ndim}
    pairs = [Matched(_named(path), tensor, others[path]) for path, tensor in learning.items() if path in others]
    if not pairs:
        frozen = {path: tensor for path, tensor in own.items() if not tensor.requires_grad}
        single = {path: tensor for path, tensor in own.items() if path not in learning and path not in frozen}
        alone = f", single numbers, which are not compared, {shown(single)}" if single else ""
        raise ModelError(
            "distillation finds no output of the compressed model that requires a gradient and that the teacher has. "
            f"The compressed model returns {shown(learning)}, without a gradient {shown(frozen)}{alone}; the teacher "
            f'returns {shown(others)}. Pair them by their paths, such as "outputs": {{"logits": ""}}'
        )
    remarks = {
        "these outputs of the compressed model have no partner in the teacher's, and do not learn from it": [
            path for path in learning if path not in others
        ],
        "these outputs of the teacher have no partner in the compressed model's": [p for p in others if p not in own],
        "these outputs of the compressed model require no gradient, and do not learn from the teacher": [
            path for path, tensor in own.items() if path in others and not tensor.requires_grad
        ],
        "these outputs are single numbers, and are not compared": [
            path for path, tensor in own.items() if path in others and tensor.requires_grad and not tensor.ndim
        ],
    }
    return pairs, [f"{what}: {shown(paths)}" for what, paths in remarks.items() if paths]


def _asked(own: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], path: str, other: str) -> Matched:
    for side, paths, wanted in (("compressed model", own, path), ("teacher", others, other)):
        if wanted not in paths:
            raise ModelError(f"outputs: the {side} returns no '{wanted}', but {shown(paths)}")
    if not own[path].requires_grad:
        raise ModelError(
            f"outputs: '{path}' of the compressed model requires no gradient, so it cannot learn; remove it"
        )
    return Matched(_named(path), own[path], others[other])


def _named(path: str) -> str:
    return f"output '{path}'" if path else "output"


def matched_features(
    pair: LayerPair, entry: FeaturePair, own: Mapping[str, Sequence[Any]], others: Mapping[str, Sequence[Any]]
) -> list[Matched]:
    """Returns the tensors of a pair of layers, one pair for each of their calls.

    Args:
        pair: The layers.
        entry: The entry of `features` that names them.
        own: What layers of the student have returned, by name, for each call.
        others: What layers of the teacher have returned.

    Raises:
        ModelError: A layer was not called, was called another number of times, or what it returns is not one tensor.
    """
    calls, their_calls = own.get(pair.student, ()), others.get(pair.teacher, ())
    for side, name, made in (("compressed model", pair.student, calls), ("teacher", pair.teacher, their_calls)):
        if not made:
            raise ModelError(
                f"features.{pair.entry}: the layer '{name}' of the {side} was not called in the last forward in "
                "training mode; name one that is, and call the whole model before controller.loss()"
            )
    if len(calls) != len(their_calls):
        raise ModelError(
            f"features.{pair.entry}: '{pair.student}' was called {len(calls)} times and the teacher's '{pair.teacher}' "
            f"{len(their_calls)} times; name layers that are called as often"
        )
    what = f"{pair.student} <- {pair.teacher} ({entry.type})"
    found = []
    for number, (mine, theirs) in enumerate(zip(calls, their_calls, strict=True)):
        student = _single(mine, entry.output, f"'{pair.student}'", pair.entry)
        if not student.requires_grad:
            raise ModelError(
                f"features.{pair.entry}: what '{pair.student}' returned has no graph, so that it cannot learn: all "
                "before it is frozen, or it is computed under no_grad or in a reentrant checkpoint"
            )
        teacher = _single(theirs, entry.output, f"'{pair.teacher}' of the teacher", pair.entry)
        found.append(Matched(what if len(calls) == 1 else f"{what}, call {number + 1}", student, teacher))
    return found


def _single(outputs: Any, path: str | None, what: str, entry: int) -> torch.Tensor:
    tensors = by_path(outputs)
    if path is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if path is None or path not in tensors:
        wanted = f"no '{path}'" if path is not None else "not one tensor"
        raise ModelError(
            f"features.{entry}: the layer {what} returns {wanted}, but {shown(tensors)}; set features.{entry}.output"
        )
    return tensors[path]
