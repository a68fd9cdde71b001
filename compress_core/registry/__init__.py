"""The registry: finds installed plugins, checks them against the contract, and collects what they contribute."""

from compress_core.registry.plugins import ContributedChoice, Contribution, LoadFailure, PluginInfo, UnplacedChoice
from compress_core.registry.registry import Registry, default_registry, use_registry

__all__ = [
    "ContributedChoice",
    "Contribution",
    "LoadFailure",
    "PluginInfo",
    "Registry",
    "UnplacedChoice",
    "default_registry",
    "use_registry",
]
