"""Writes ONNX files and OpenVINO IR for OpenVINO."""

from __future__ import annotations

from typing import ClassVar

from compress_core.export.onnx.exporter import OnnxExporter
from compress_core.export.runtimes.openvino import OpenVino


class OpenVinoExporter(OnnxExporter):
    """Writes ONNX files and runs them in OpenVINO."""

    name: ClassVar[str] = "OpenVINO"
    devices: ClassVar[tuple[str, ...]] = ("ANY", "CPU", "GPU", "NPU", "openvino-cpu")
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra: ClassVar[str] = "openvino"

    runtime = OpenVino()
