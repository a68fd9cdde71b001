"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from compress_core.export.runtimes.runtime import Array, Executed, Port, Runtime, RuntimeSession

# What its types are called, as far as files of ours have inputs of them.
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")},
}
# Kernels that multiply integers. `MatMulIntegerToFloat` and `DynamicQuantizeMatMul` return floating-point numbers.
_INTEGER = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QAttention")


class OnnxRuntime(Runtime):
    """ONNX Runtime with its CPU provider."""

    name: ClassVar[str] = "ONNX Runtime"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnx"

    @property
    def label(self) -> str:
        """Name and version."""
        import onnxruntime  # noqa: PLC0415 - an extra

        return f"{self.name} {onnxruntime.__version__}"

    def load(
        self, path: Path, *, optimized: bool = True, threads: int | None = None, profile: bool = False
    ) -> _Session:
        """Loads a file; see `Runtime.load`."""
        return _Session(path, optimized, threads, profile)


class _Session(RuntimeSession):
    def __init__(self, path: Path, optimized: bool, threads: int | None, profile: bool) -> None:
        import onnxruntime  # noqa: PLC0415 - an extra

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only, because its warnings about saved graphs do not concern users
        options.intra_op_num_threads = threads or torch.get_num_threads()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        self._folder = tempfile.TemporaryDirectory() if profile else None
        if self._folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(
            Port(
                entry.name,
                np.dtype(_DTYPES.get(entry.type, np.float32)),
                tuple(size if isinstance(size, int) else None for size in entry.shape),
            )
            for entry in self._session.get_inputs()
        )
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Returns the outputs for these inputs."""
        outputs: list[Array] = self._session.run(None, dict(feeds))
        return outputs

    def executed(self, feeds: Mapping[str, Array]) -> list[Executed]:
        """Runs the file and returns what was executed, from the session's profile; this works once."""
        assert self._folder is not None, "the session was not loaded with profile=True"
        self._session.run(None, dict(feeds))
        text = Path(self._session.end_profiling()).read_text(encoding="utf-8")
        self._folder.cleanup()
        found: dict[str, Executed] = {}
        for event in json.loads(text):
            name = str(event.get("name", ""))
            if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
                continue
            operator = str(event["args"].get("op_name", ""))
            name = name.removesuffix("_kernel_time")
            before = found[name].microseconds if name in found else 0.0  # the body of a loop
            took = before + float(event["dur"])
            found[name] = Executed(name, (name,), operator, operator.startswith(_INTEGER), took)
        return list(found.values())
