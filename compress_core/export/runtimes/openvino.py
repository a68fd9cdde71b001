"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from compress_core.export.runtimes.runtime import Array, Executed, Port, Runtime, RuntimeSession

_INTEGER = frozenset(["i8", "u8", "I8", "U8"])


class OpenVino(Runtime):
    """OpenVINO with its CPU device."""

    name: ClassVar[str] = "OpenVINO"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"

    @property
    def label(self) -> str:
        """Name and version."""
        import openvino  # noqa: PLC0415 - an extra

        return f"{self.name} {openvino.__version__.partition('-')[0]}"

    def load(
        self, path: Path, *, optimized: bool = True, threads: int | None = None, profile: bool = False
    ) -> _Session:
        """Loads a file; see `Runtime.load`. Without optimizations, nothing is computed in integers."""
        return _Session(path, optimized, threads, profile)


@cache
def _core() -> Any:
    """Returns the one Core of this process, which is never given up.

    Each Core replaces the stack that the thread's signals are handled on, and puts back the one before it at its end.
    Two that do not end in the reverse order leave a stack that does not exist any more, and the next signal, such as
    Ctrl-C, kills the process without a word.
    """
    import openvino  # noqa: PLC0415 - an extra

    return openvino.Core()


class _Session(RuntimeSession):
    def __init__(self, path: Path, optimized: bool, threads: int | None, profile: bool) -> None:
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            # bfloat16 where the processor has it would be another model than the one that is compared.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": profile,
            "LP_TRANSFORMS_MODE": "YES" if optimized else "NO",
        }
        model = _core().read_model(str(path))
        self._model = _core().compile_model(model, "CPU", options)
        self._request = self._model.create_infer_request()
        self.inputs = tuple(
            Port(
                port.get_any_name(),
                np.dtype(port.get_element_type().to_dtype()),
                tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()),
            )
            for port in self._model.inputs
        )
        self.outputs = tuple(port.get_any_name() for port in self._model.outputs)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Returns the outputs for these inputs."""
        result = self._request.infer(dict(feeds))
        return [np.array(result[port]) for port in self._model.outputs]

    def executed(self, feeds: Mapping[str, Array]) -> list[Executed]:
        """Runs the file and returns what was executed, from the compiled model and its counters."""
        self._request.infer(dict(feeds))
        times = {entry.node_name: entry.real_time.total_seconds() * 1e6 for entry in self._request.profiling_info}
        found = []
        for node in self._model.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            values = {key: str(info[key].astype(str)) for key in _KEYS if key in info}
            operator = values.get("layerType", node.get_type_name())
            if operator in _NOT_EXECUTED:
                continue
            nodes = tuple(filter(None, values.get("originalLayersNames", "").split(",")))
            name = node.get_friendly_name()
            is_integer = values.get("runtimePrecision", "") in _INTEGER
            found.append(Executed(name, nodes, operator, is_integer, times.get(name, 0.0)))
        return found


_NOT_EXECUTED = frozenset(["Const", "Input", "Output", "Parameter", "Result"])
_KEYS = ("layerType", "originalLayersNames", "runtimePrecision")
