"""Exports compressed models for runtimes, and compares each file with the model in torch before it is written."""

from compress_core.export.executorch.exporter import ExecuTorchExporter
from compress_core.export.exporter import Exporter, ExportJob, Options
from compress_core.export.onnx.exporter import OnnxExporter
from compress_core.export.onnx.openvino import OpenVinoExporter
from compress_core.export.onnx.tensorrt import TensorRtExporter
from compress_core.export.picture import draw_layers
from compress_core.export.report import Agreement, ExportReport, LayerAgreement, Work
from compress_core.export.runtimes import Executed, Port, Runtime, RuntimeSession
from compress_core.export.target import ExportTarget, GraphRewrite

__all__ = [
    "Agreement",
    "ExecuTorchExporter",
    "Executed",
    "ExportJob",
    "ExportReport",
    "ExportTarget",
    "Exporter",
    "GraphRewrite",
    "LayerAgreement",
    "OnnxExporter",
    "OpenVinoExporter",
    "Options",
    "Port",
    "Runtime",
    "RuntimeSession",
    "TensorRtExporter",
    "Work",
    "draw_layers",
]
