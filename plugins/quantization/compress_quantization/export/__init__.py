"""Exports quantized models with integer weights and operators that runtimes compute with integers."""

from compress_quantization.export.graph import rewrite
from compress_quantization.export.prepare import prepare, prepare_decomposed
from compress_quantization.export.program import rewrite_program

__all__ = ["prepare", "prepare_decomposed", "rewrite", "rewrite_program"]
