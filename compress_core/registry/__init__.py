"""What is installed: finding plugins, holding them against the contract, and asking them what they contribute."""

from compress_core.registry.registry import (
    Contribution,
    LoadFailure,
    PluginInfo,
    Registry,
    default_registry,
    use_registry,
)

__all__ = ["Contribution", "LoadFailure", "PluginInfo", "Registry", "default_registry", "use_registry"]
