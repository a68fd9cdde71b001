"""Writes ONNX files for TensorRT."""

from __future__ import annotations

from typing import ClassVar

from compress_core.export.onnx.exporter import OnnxExporter


class TensorRtExporter(OnnxExporter):
    """Writes ONNX files whose quantizers stand as TensorRT demands; they are run in ONNX Runtime, not in TensorRT."""

    name: ClassVar[str] = "TensorRT"
    devices: ClassVar[tuple[str, ...]] = ("tensorrt",)
