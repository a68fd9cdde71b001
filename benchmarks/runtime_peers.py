"""Quantizes an ONNX file after training with other tools, the peers of `benchmarks.runtimes`: NNCF 3, ONNX Runtime's.

Usage: python -m benchmarks.runtime_peers TOOL FP32.onnx DATA.npz RESULT

`TOOL` is `nncf-onnx`, `nncf-openvino` (writes IR) or `onnxruntime`. NNCF has requirements of its own, so this is run
with the Python of another environment, and imports nothing of compress-core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def _feeds(data: str) -> list[dict[str, Any]]:
    """Returns the calibration data, one sample at a time."""
    arrays = dict(np.load(data))
    size = len(next(iter(arrays.values())))
    return [{name: array[index : index + 1] for name, array in arrays.items()} for index in range(size)]


def nncf_onnx(model: str, data: str, result: str) -> None:
    """NNCF on an ONNX model, for CPUs."""
    import nncf
    import onnx

    feeds = _feeds(data)
    found = nncf.quantize(
        onnx.load(model), nncf.Dataset(feeds), subset_size=len(feeds), target_device=nncf.TargetDevice.CPU
    )
    onnx.save(found, result)


def nncf_openvino(model: str, data: str, result: str) -> None:
    """NNCF on an OpenVINO model, for CPUs."""
    import nncf
    import openvino

    feeds = _feeds(data)
    found = nncf.quantize(
        openvino.Core().read_model(model),
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        target_device=nncf.TargetDevice.CPU,
    )
    openvino.save_model(found, result, compress_to_fp16=False)


def onnxruntime_static(model: str, data: str, result: str) -> None:
    """ONNX Runtime's static quantization, as its documentation advises for x86 without VNNI: QDQ, 7-bit weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter(_feeds(data))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    prepared = str(Path(result).with_suffix(".prepared.onnx"))
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        result,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


TOOLS: dict[str, Callable[[str, str, str], None]] = {
    "nncf-onnx": nncf_onnx,
    "nncf-openvino": nncf_openvino,
    "onnxruntime": onnxruntime_static,
}

if __name__ == "__main__":
    TOOLS[sys.argv[1]](*sys.argv[2:5])
