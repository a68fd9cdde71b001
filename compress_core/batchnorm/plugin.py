"""The core's own plugin: the shared initializers, registered like anybody's."""

from __future__ import annotations

from compress_core.batchnorm.adaptation import BatchNormAdaptation
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.initializer import Initializer


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns batch-norm adaptation."""
    return [BatchNormAdaptation]
