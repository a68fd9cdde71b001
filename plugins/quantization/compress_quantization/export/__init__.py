"""Exports quantized models with integer weights and operators that runtimes compute with integers."""

from compress_quantization.export.graph import rewrite
from compress_quantization.export.prepare import prepare

__all__ = ["prepare", "rewrite"]
