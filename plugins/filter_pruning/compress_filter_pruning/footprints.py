"""What pruned channels mean for the size of a model."""

from __future__ import annotations

from compress_core.contract.footprint import Footprint
from compress_filter_pruning.config import FilterPruningConfig
from compress_filter_pruning.pruner import Pruner


def without_channels(
    footprint: Footprint, pruner: Pruner, config: FilterPruningConfig, undecided: str, *, at_end: bool
) -> Footprint:
    """Returns a footprint without the pruned channels.

    Args:
        footprint: The footprint with all channels.
        pruner: Chooses channels.
        config: The section; its values must not count as read.
        undecided: What data will decide about the channels; empty if nothing.
        at_end: Whether the target is asked for; otherwise what is pruned now, or will be at the creation.
    """
    compares_groups = config.params.is_global
    if undecided and compares_groups:
        return footprint.left_open(undecided)
    if at_end:
        left = pruner.left_at(config.target)
    else:
        left = pruner.left_at(config.pruning_init) if undecided else pruner.left()
    words = {
        name: _words(filters, filters * now // group.full_size)
        for group, now in zip(pruner.groups, left, strict=True)
        for name, filters in group.full_filters.items()
    }
    found = footprint.with_shapes(pruner.shapes(left), pruner.operations(left)).remarked(words)
    if config.params.target_key == "pruning_latency_target" and at_end:
        found = found.noted("how much goes follows from a latency measured just now; the creation measures again")
    if undecided:
        return found.noted(undecided)
    if at_end and compares_groups and left != pruner.left():
        return found.noted("all channels are compared by the weights as they are now, and training moves those")
    return found


def _words(filters: int, left: int) -> str:
    return f"{filters} to {left} filters" if left < filters else f"all {filters} filters stay"
