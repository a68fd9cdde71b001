"""The hooks with which this package registers itself with compress-core."""

from __future__ import annotations

from compress_core import Algorithm, hookimpl
from compress_knowledge_distillation.algorithm import KnowledgeDistillation


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns knowledge distillation."""
    return [KnowledgeDistillation]
