"""Callbacks for training libraries: each calls the controller at the right places of that library's loop.

A library is imported only by its own module: `compress_core.integrations.transformers`, `.lightning`, `.accelerate`.
"""

from compress_core.integrations.saved_run import read_compression_state

__all__ = ["read_compression_state"]
