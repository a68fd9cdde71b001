"""Runs the exported graph in ONNX Runtime and compares its outputs with those of the model in torch."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress_core.errors import ExportError
from compress_core.export.layers import Cut
from compress_core.export.references import Reference
from compress_core.export.report import Agreement

_LEVELS = 255  # steps of an 8-bit grid


class DisagreementError(ExportError):
    """The runtime fails on a batch, or computes something else than torch.

    Attributes:
        batch_size: Number of samples in the batch.
        found: What was found, without advice.
    """

    def __init__(self, batch_size: int, found: str, advice: str = "") -> None:
        super().__init__(found + advice)
        self.batch_size = batch_size
        self.found = found


class _RunError(DisagreementError):
    """The runtime fails; its own error is the cause."""


def _advice(serialized: bytes) -> str:
    """Returns what to do about a file that the runtime cannot load or run, if there is anything."""
    import onnx  # noqa: PLC0415 - an extra

    graph = onnx.load_from_string(serialized).graph
    scales = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] > 1}
    found = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear" and node.input[1] in scales]
    if not found:
        return ""
    return (
        f". {len(found)} activations have a scale for each channel (the first is '{found[0]}'), which runtimes support "
        'in few places: quantize activations with one scale ("per_channel": false)'
    )


def runtime_name() -> str:
    """Returns name and version of the runtime."""
    import onnxruntime  # noqa: PLC0415 - an extra

    return f"ONNX Runtime {onnxruntime.__version__}"


def compare(serialized: bytes, references: Sequence[Reference], *, optimized: bool) -> list[Agreement]:
    """Runs a graph and returns how its outputs differ from those in torch.

    Args:
        serialized: The graph.
        references: Batches with the outputs of torch.
        optimized: Whether the runtime may optimize the graph.

    Raises:
        ExportError: The runtime cannot load or run the graph, or its outputs differ in number or shape.
    """
    try:
        session = _session(serialized, optimized=optimized)
    except Exception as error:
        message = f"{runtime_name()} cannot load what was exported: {str(error).strip()}{_advice(serialized)}"
        raise ExportError(message) from error
    try:
        return [agreement for reference in references for agreement in _agreements(session, reference, optimized)]
    except _RunError as error:
        size = error.batch_size
        message = f"{runtime_name()} cannot run what was exported on a batch of {size}: {error.__cause__}"
        raise DisagreementError(size, message, _advice(serialized)) from error.__cause__


def compare_parts(
    cut: Cut, reference: Reference, *, optimized: bool
) -> tuple[list[Agreement], list[tuple[str, float]]]:
    """Runs the parts of a graph on what torch computes, and returns how they differ from torch.

    Args:
        cut: The graph, cut behind its quantizers.
        reference: The batch for which it was cut, with the outputs of torch.
        optimized: Whether the runtime may optimize the graph.

    Returns:
        The comparison of each output, and the quantizers that depart: place and steps.
    """
    session = _session(cut.serialized, optimized=optimized)
    own = len(session.get_outputs()) - len(cut.parts)
    outputs = session.run(None, _feed(session, reference) | cut.feeds)
    names = [entry.name for entry in session.get_outputs()[:own]]
    size = reference.inputs.batch_size
    return _compared(names, outputs[:own], cut.outputs, size, optimized), cut.departures(outputs[own:])


def _agreements(session: Any, reference: Reference, optimized: bool) -> list[Agreement]:
    size = reference.inputs.batch_size
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(reference.inputs.tensors):
        raise ExportError(
            f"the exported graph has {len(names)} inputs ({', '.join(names)}), and the model was given "
            f"{len(reference.inputs.tensors)} tensors: an argument without effect on the outputs? Leave it out of args"
        )
    try:
        outputs = session.run(None, _feed(session, reference))
    except Exception as error:
        raise _RunError(size, "") from error
    found = [entry.name for entry in session.get_outputs()]
    if len(found) != len(reference.outputs):
        raise ExportError(f"the exported graph has {len(found)} outputs, the model {len(reference.outputs)}")
    return _compared(found, outputs, reference.outputs, size, optimized)


def _feed(session: Any, reference: Reference) -> dict[str, npt.NDArray[Any]]:
    pairs = zip(session.get_inputs(), reference.inputs.tensors, strict=False)
    return {entry.name: _fed(tensor, entry) for entry, tensor in pairs}


def _compared(
    names: Sequence[str], outputs: Sequence[Any], expected: Sequence[torch.Tensor], size: int, optimized: bool
) -> list[Agreement]:
    return [
        _agreement(name, size, optimized, _as_numpy(tensor), np.asarray(actual))
        for name, tensor, actual in zip(names, expected, outputs, strict=True)
    ]


def _fed(tensor: torch.Tensor, entry: Any) -> npt.NDArray[Any]:
    """Returns a tensor for an input of the runtime; a file that computes in float32 takes other floats as float32."""
    return (tensor.float() if entry.type == "tensor(float)" else tensor).numpy()


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _agreement(
    name: str, size: int, optimized: bool, expected: npt.NDArray[Any], actual: npt.NDArray[Any]
) -> Agreement:
    if expected.shape != actual.shape:
        raise DisagreementError(
            size,
            f"output '{name}' has shape {actual.shape} in the runtime and {expected.shape} in torch, "
            f"on a batch of {size}",
        )
    if not expected.size:
        return Agreement(name, size, optimized, 0.0, 0.0, 0.0, 0.0, 0.0)
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    difference = np.asarray(np.abs(wide - other))  # numpy makes a number of an array without dimensions
    # The difference of equal infinities is NaN, and masked attention scores are infinite.
    difference[wide == other] = 0.0
    difference[np.isnan(wide) & np.isnan(other)] = 0.0
    difference = np.where(np.isfinite(difference), difference, math.inf)
    finite = wide[np.isfinite(wide)]
    magnitudes = np.abs(finite) if finite.size else np.zeros(1)
    step = (finite.max() - finite.min()) / _LEVELS if finite.size else 0.0
    largest, mean = float(difference.max()), float(difference.mean())
    return Agreement(
        name,
        size,
        optimized,
        largest,
        mean,
        _ratio(largest, float(magnitudes.max())),
        _ratio(mean, float(magnitudes.mean())),
        _ratio(largest, float(step)),
        _top1(expected, actual),
    )


def _ratio(value: float, unit: float) -> float:
    if value == 0:
        return 0.0
    return value / unit if unit > 0 else math.inf


def _top1(expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float | None:
    if expected.ndim < 2 or expected.shape[-1] < 2 or not np.issubdtype(expected.dtype, np.floating):
        return None
    return float((expected.argmax(-1) == actual.argmax(-1)).mean())


def optimized_operators(serialized: bytes) -> dict[str, int]:
    """Returns how many nodes of each operator the runtime executes after optimizing the graph."""
    import onnx  # noqa: PLC0415 - an extra

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _session(serialized, optimized=True, save_to=path)
        graph = onnx.load(path, load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _session(serialized: bytes, *, optimized: bool, save_to: Path | None = None) -> Any:
    import onnxruntime  # noqa: PLC0415 - an extra

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only, because its warnings about saved graphs do not concern users
    options.intra_op_num_threads = torch.get_num_threads()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
