"""The demo's second half: 8 bits, alone and on top of sparsity, and a file of integers that a runtime computes with."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core import CompressionConfig, CompressionController, create_compressed_model, register_default_init_args
from compress_core.contract.statistics import Table
from examples.common.datasets import Dataset
from examples.common.training import accuracy, train

# The example of NNCF's documentation as it stands there, comments included.
DOCUMENTED = Path(__file__).parent / "configs" / "quantization_bn_adaptation.json"
Step = Callable[[str], Any]


def quantize(
    step: Step, fp32: nn.Module, data: Dataset, sparse: dict[str, Any], *, flip: bool
) -> CompressionController:
    """Quantizes a trained network, adapts and trains it, and makes a sparse one integer too.

    Args:
        step: Opens a row of the demo's table.
        fp32: The trained network; it stays as it is.
        data: The data.
        sparse: Config of the sparsity that the demo has used.
        flip: Whether training mirrors images.

    Returns:
        The controller of the network with 8 bits, trained for an epoch.
    """
    loader = data.loader(train=True, batch_size=64, shuffle=True)
    document = CompressionConfig.from_json(DOCUMENTED).source
    # "the input shape of your model may vary", says the example.
    document["input_info"] = {"sample_size": [1, *data.train[0].shape[1:]]}

    unadapted = copy.deepcopy(document)
    del unadapted["compression"]["initializer"]
    with step("8 bits, ranges calibrated") as row:
        _, row["model"] = create_compressed_model(
            copy.deepcopy(fp32), register_default_init_args(unadapted, loader), init_loader=loader
        )
    with step("8 bits, calibrated and adapted") as row:
        controller, row["model"] = create_compressed_model(
            copy.deepcopy(fp32), register_default_init_args(document, loader)
        )
    torch.manual_seed(1)
    with step("8 bits, one epoch of training") as row:
        tuning = data.loader(train=True, batch_size=128, shuffle=True, seed=1)
        train(controller.model, tuning, epochs=1, max_lr=0.01, flip=flip, controller=controller)
        row["model"] = controller.model

    both = document | {"compression": [sparse, document["compression"]]}
    with step("sparse as above and 8 bits, adapted") as row:
        _, row["model"] = create_compressed_model(copy.deepcopy(fp32), register_default_init_args(both, loader))
    return controller


def export(controller: CompressionController, fp32: nn.Module, data: Dataset, folder: Path) -> Table:
    """Writes the network in floats and in integers, and compares them in ONNX Runtime.

    Returns:
        A table: file, accuracy, size, and time for a batch.
    """
    example = data.test[0][:64]
    files = {"FP32": folder / "fp32.onnx", "8 bits": folder / "int8.onnx"}
    logging.getLogger("compress_core.api").setLevel(logging.ERROR)  # that nothing is compressed is the point here
    plain, _ = create_compressed_model(copy.deepcopy(fp32), {"compression": []})
    plain.export_onnx(files["FP32"], example)
    controller.export_onnx(files["8 bits"], example)
    sessions = {name: OnnxModel(path) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(50):  # one after the other, so that both see the same machine
        for name, session in sessions.items():
            started = time.perf_counter()
            session(example)
            times[name].append(time.perf_counter() - started)
    rows = [
        (
            path.name,
            accuracy(sessions[name], data.test),
            path.stat().st_size / 1024,
            1000 * statistics.median(times[name]),
        )
        for name, path in files.items()
    ]
    return Table("in ONNX Runtime, one thread", ("file", "accuracy, %", "size, KiB", "ms for 64 images"), rows)


class OnnxModel(nn.Module):
    """An ONNX file, called like the network that it came from.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime  # noqa: PLC0415 - an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the first output."""
        return torch.from_numpy(self._session.run(None, {self._input: images.numpy()})[0])
