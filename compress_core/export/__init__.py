"""Export of compressed models to runtimes, checked on the spot against the model in torch."""

from compress_core.export.report import Agreement, ExportReport
from compress_core.export.target import ExportTarget, GraphRewrite

__all__ = ["Agreement", "ExportReport", "ExportTarget", "GraphRewrite"]
