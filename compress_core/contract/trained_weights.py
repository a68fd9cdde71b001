"""Which weights are trained: what is learned beside a weight that is not would move alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.context import Context
from compress_core.transforms.layers import WeightTensor

logger = logging.getLogger(__name__)


def trained_weights(
    targets: Iterable[WeightTensor], skipped: dict[str, str], algorithm: Algorithm, context: Context
) -> list[WeightTensor]:
    """Returns the weights that are trained, adds the others to `skipped`, and warns of these.

    When a state is resumed, those count as trained that were when it was saved.

    Args:
        targets: The weights, as `context.weight_targets` returns them.
        skipped: Name of a weight -> the reason; it is changed.
        algorithm: The caller.
        context: The context.
    """
    saved = context.saved_plans.get(algorithm.name) if context.resuming else None
    kept, frozen = [], []
    for tensor in targets:
        is_trained = tensor.parameter is not None and tensor.parameter.requires_grad
        if is_trained if saved is None else tensor.name not in saved.skipped:
            kept.append(tensor)
        else:
            frozen.append(tensor.name)
    reason = "is frozen: requires_grad is False"
    skipped.update({name: reason if saved is None else saved.skipped[name] for name in frozen})
    if frozen and saved is None:
        path, _ = context.section(algorithm)
        logger.warning(
            "%s: %d weights are frozen (requires_grad is False), such as '%s', and stay as they are; set "
            "requires_grad before create_compressed_model, or name the layers in ignored_scopes",
            path,
            len(frozen),
            frozen[0],
        )
    return kept
