"""`ExportTarget`: what a file is written for, which algorithms need to know to prepare the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# Changes the exported graph in place: for the format `onnx` an `onnx_ir.Model`, for `executorch` a
# `torch.fx.GraphModule` with functional ATen operators.
GraphRewrite: TypeAlias = Callable[[Any], None]


@dataclass(frozen=True)
class ExportTarget:
    """What a file is written for.

    Attributes:
        format: How the file describes the model: `onnx`, or `executorch` (a graph of `torch.export` with the
            operators of `torch.ops.quantized_decomposed`).
        opset: Version of ONNX's default operator set; 0 for other formats.
        name: Name of the choice at `export.target`, such as `onnxruntime`.
    """

    format: str
    opset: int
    name: str = "onnxruntime"
