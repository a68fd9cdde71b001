"""The config: its sections, how it is loaded, and how its errors are reported."""

from compress_core.config.document import CompressionConfig
from compress_core.config.sections import (
    AlgorithmConfig,
    Count,
    InitializerConfig,
    InitializerSection,
    Scopes,
    Section,
)

__all__ = [
    "AlgorithmConfig",
    "CompressionConfig",
    "Count",
    "InitializerConfig",
    "InitializerSection",
    "Scopes",
    "Section",
]
