"""Runs exported files in the runtimes that they are written for."""

from compress_core.export.runtimes.runtime import Executed, Port, Runtime, RuntimeSession

__all__ = ["Executed", "Port", "Runtime", "RuntimeSession"]
