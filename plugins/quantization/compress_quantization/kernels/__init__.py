"""Kernels that put a tensor on a grid: compiled where there is a compiler, cache-blocked eager ones elsewhere."""

from compress_quantization.kernels.compiled import is_available, kernel_count, set_compiled
from compress_quantization.kernels.function import can_replace, fake_quantize
from compress_quantization.kernels.sources import Source
from compress_quantization.kernels.task import Task

__all__ = ["Source", "Task", "can_replace", "fake_quantize", "is_available", "kernel_count", "set_compiled"]
