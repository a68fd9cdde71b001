"""`ExportTarget`: the format of an export, which algorithms need to know to prepare the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# Changes the exported graph (an `onnx_ir.Model`) in place.
GraphRewrite: TypeAlias = Callable[[Any], None]


@dataclass(frozen=True)
class ExportTarget:
    """The format of an export.

    Attributes:
        format: Its name; `onnx` is the only one.
        opset: Version of ONNX's default operator set.
    """

    format: str
    opset: int
