"""Kernels that put a tensor on a grid: compiled where there is a compiler, cache-blocked eager ones elsewhere."""

from compress_quantization.kernels.compiled import is_available, kernel_count, set_compiled
from compress_quantization.kernels.function import Task, fake_quantize

__all__ = ["Task", "fake_quantize", "is_available", "kernel_count", "set_compiled"]
