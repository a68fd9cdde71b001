"""The core's own plugin: the shared initializers, registered like anybody's."""

from __future__ import annotations

from compress_core.hookspecs import hookimpl
from compress_core.initializers.base import Initializer
from compress_core.initializers.batchnorm_adaptation import BatchNormAdaptation


@hookimpl
def compress_initializers() -> list[type[Initializer]]:
    """Returns batch-norm adaptation."""
    return [BatchNormAdaptation]
