"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Algorithm, hookimpl
from compress_learned_sparsity.const.algorithm import ConstSparsity
from compress_learned_sparsity.movement.algorithm import MovementSparsity
from compress_learned_sparsity.rb.algorithm import RBSparsity

plugin_name = "learned_sparsity"
"""What messages call it, whichever of its entry points it was loaded through."""


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns the three algorithms."""
    return [ConstSparsity, RBSparsity, MovementSparsity]
