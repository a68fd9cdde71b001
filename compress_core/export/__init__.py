"""Exports compressed models to ONNX, and compares each file with the model in torch before it is written."""

from compress_core.export.report import Agreement, ExportReport
from compress_core.export.target import ExportTarget, GraphRewrite

__all__ = ["Agreement", "ExportReport", "ExportTarget", "GraphRewrite"]
