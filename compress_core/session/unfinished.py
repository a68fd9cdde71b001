"""What is said where a model leaves the training before it is compressed as far as its config asks for."""

from __future__ import annotations

from torch import nn

from compress_core.contract.levels import has_settable_rate
from compress_core.contract.stages import CompressionStage
from compress_core.session.lifecycle import Lifecycle


def unfinished(model: nn.Module, lifecycle: Lifecycle) -> str:
    """Returns which algorithms have done less than their sections ask for, as the end of a sentence; else nothing.

    A level that accuracy-aware training searches may be lower than the section's.

    Args:
        model: The compressed model.
        lifecycle: Its algorithms.
    """
    searches = lifecycle.context.config.root.unread().accuracy_aware_training is not None
    stages = lifecycle.stages(model)
    less = [
        f"{algorithm.name} is {stages[algorithm.name].name.lower().replace('_', ' ')}"
        for algorithm in lifecycle.algorithms
        if stages.get(algorithm.name, CompressionStage.FULLY_COMPRESSED) != CompressionStage.FULLY_COMPRESSED
        and not (searches and has_settable_rate(algorithm))
    ]
    if not less:
        return ""
    return (
        f"is compressed less than the config asks for: {', '.join(less)}. Train until the schedule ends, or let it end "
        "earlier"
    )
