"""Export of quantized models: integers in the file, and operators that runtimes compute with integers."""

from compress_quantization.export.graph import rewrite
from compress_quantization.export.prepare import prepare

__all__ = ["prepare", "rewrite"]
