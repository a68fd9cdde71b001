"""Runs an ONNX file in a runtime, compares its outputs with those of the model in torch, and explains differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compress_core.errors import ExportError
from compress_core.export.agreement import DisagreementError, RunError, compared
from compress_core.export.onnx.layers import Cut
from compress_core.export.references import Reference
from compress_core.export.report import Agreement, ExportReport
from compress_core.export.runtimes.onnxruntime import OnnxRuntime
from compress_core.export.runtimes.runtime import Array, Port, Runtime, RuntimeSession

# Added to the error if the file agrees with torch without optimizations: then the integer kernels are the cause.
_SATURATION = (
    ". With the optimizations off they agree: on processors without VNNI instructions, integer kernels saturate when "
    "they add two products of 8 bits; weights on half-range grids (quantization's overflow_fix) prevent it"
)
_LAST_LAYERS = 0.01  # of the mean absolute output: what layers after the last quantizers may differ by


def verified(
    report: ExportReport,
    runtime: Runtime,
    path: Path,
    references: Sequence[Reference],
    cut_for: Callable[[Reference], Cut | None],
    is_strict: bool,
) -> ExportReport:
    """Returns a report with the comparison of a file and torch.

    Args:
        report: The report so far.
        runtime: What runs the file.
        path: The file.
        references: Batches with the outputs of torch.
        cut_for: Returns the file cut behind its quantizers, for a batch.
        is_strict: Whether the tolerance holds although only roundings add up.

    Raises:
        ExportError: The runtime cannot load or run the file, or it differs by more than the tolerance.
    """
    levels = runtime.levels
    agreements = [a for optimized in levels for a in compare(runtime, path, references, optimized=optimized)]
    report = replace(
        report, runtime=runtime.label, runtime_operators=_operators(runtime, path), agreements=tuple(agreements)
    )
    notes: dict[float, str] = {}
    for optimized in levels:
        worst = report.worst(optimized=optimized)
        if worst is None or worst.relative_mean <= report.tolerance:
            continue
        difference = (
            f"output '{worst.output}' of {report.runtime} (graph optimizations {'on' if optimized else 'off'}) "
            f"differs from torch by {worst.relative_mean:.3g} of its mean absolute value (largest difference: "
            f"{worst.relative:.3g} of its largest value), on "
        )
        place = worst.batch_size, worst.sizes
        reference = next(entry for entry in references if (entry.inputs.batch_size, entry.inputs.label) == place)
        difference += reference.inputs.described
        advice, is_rounding = _explained(runtime, cut_for(reference), reference, optimized)
        if is_strict or not is_rounding:
            kept = f"; tolerance is {report.tolerance:.3g}. No file was written. "
            raise DisagreementError(worst.batch_size, difference, kept + advice, worst.sizes)
        notes.setdefault(worst.relative_mean, f"is right, but its {difference}. {advice}")
    return replace(report, notes=(*report.notes, *(notes[most] for most in sorted(notes)[-1:])))


def _operators(runtime: Runtime, path: Path) -> dict[str, int]:
    """Returns how many nodes of each operator the runtime executes after optimizing the graph."""
    if not isinstance(runtime, OnnxRuntime):
        return {}
    graph = runtime.optimized_graph(path)
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _explained(runtime: Runtime, cut: Cut | None, reference: Reference, optimized: bool) -> tuple[str, bool]:
    """Returns what to say about a file that differs from torch, and whether roundings that add up are all there is."""
    if cut is None:
        advice = (
            "If this is expected (an untrained network, inputs unlike the calibration data), pass realistic inputs as "
            "args, or a larger tolerance"
        )
        return advice + (_SATURATION if optimized else ""), False
    agreements, departures = compare_parts(runtime, cut, reference, optimized=optimized)
    if departures:
        place, steps = departures[0]
        what = "has another scale than in torch"
        if math.isfinite(steps):
            what = f"is {steps:.3g} steps away from what torch rounds, though computed from torch's own activations"
        return (
            f"The first tensor that departs is quantized at {place}: it {what}. This is more than rounding; name the "
            "layer before it in ignored_scopes" + (_SATURATION if optimized else ", and report it"),
            False,
        )
    worst = max(agreements, key=lambda agreement: agreement.relative_mean)
    if not worst.relative_mean <= _LAST_LAYERS:
        return (
            f"All {len(cut.parts)} quantized tensors agree, but '{worst.output}', computed from torch's own "
            f"activations, differs by {worst.relative_mean:.3g}: it is the part after the last quantizers that departs"
            + (_SATURATION if optimized else ""),
            False,
        )
    return (
        f"Only roundings add up: each of its {len(cut.parts)} quantized tensors agrees with torch within a step if it "
        "is computed from torch's own activations. Networks with random weights amplify roundings",
        True,
    )


def compare(runtime: Runtime, path: Path, references: Sequence[Reference], *, optimized: bool) -> list[Agreement]:
    """Runs a file and returns how its outputs differ from those in torch.

    Args:
        runtime: What runs it.
        path: The file.
        references: Batches with the outputs of torch.
        optimized: Whether the runtime may optimize the graph.

    Raises:
        ExportError: The runtime cannot load or run the graph, or its outputs differ in number or shape.
    """
    try:
        session = runtime.load(path, optimized=optimized)
    except Exception as error:
        message = f"{runtime.label} cannot load what was exported: {str(error).strip()}{_advice(path)}"
        raise ExportError(message) from error
    try:
        return [agreement for reference in references for agreement in _agreements(session, reference, optimized)]
    except RunError as error:
        message = f"{runtime.label} cannot run what was exported on {error.found}: {str(error.__cause__).strip()}"
        raise RunError(error.batch_size, message, _advice(path), error.sizes) from error.__cause__


def compare_parts(
    runtime: Runtime, cut: Cut, reference: Reference, *, optimized: bool
) -> tuple[list[Agreement], list[tuple[str, float]]]:
    """Runs the parts of a graph on what torch computes, and returns how they differ from torch.

    Args:
        runtime: What runs them.
        cut: The graph, cut behind its quantizers.
        reference: The batch for which it was cut, with the outputs of torch.
        optimized: Whether the runtime may optimize the graph.

    Returns:
        The comparison of each output, and the quantizers that depart: place and steps.
    """
    session = runtime.load(cut.path, optimized=optimized)
    own = len(session.outputs) - len(cut.parts)
    outputs = session.run(feeds_of(session, reference) | cut.feeds)
    size = reference.inputs.batch_size
    return compared(session.outputs[:own], outputs[:own], cut.outputs, size, optimized), cut.departures(outputs[own:])


def _agreements(session: RuntimeSession, reference: Reference, optimized: bool) -> list[Agreement]:
    size = reference.inputs.batch_size
    names = [port.name for port in session.inputs]
    if len(names) != len(reference.inputs.tensors):
        raise ExportError(
            f"the exported graph has {len(names)} inputs ({', '.join(names)}), and the model was given "
            f"{len(reference.inputs.tensors)} tensors: an argument without effect on the outputs? Leave it out of args"
        )
    try:
        outputs = session.run(feeds_of(session, reference))
    except Exception as error:
        raise RunError(size, reference.inputs.described, sizes=reference.inputs.label) from error
    if len(session.outputs) != len(reference.outputs):
        raise ExportError(f"the exported graph has {len(session.outputs)} outputs, the model {len(reference.outputs)}")
    try:
        found = compared(session.outputs, outputs, reference.outputs, size, optimized)
    except DisagreementError as error:
        found_out = error.found.replace(f"a batch of {size}", reference.inputs.described)
        raise DisagreementError(size, found_out, sizes=reference.inputs.label) from error
    return [replace(agreement, sizes=reference.inputs.label) for agreement in found]


def feeds_of(session: RuntimeSession, reference: Reference) -> dict[str, Array]:
    """Returns the inputs of a batch by the names that a session gives them."""
    pairs = zip(session.inputs, reference.inputs.tensors, strict=False)
    return {port.name: _fed(tensor, port) for port, tensor in pairs}


def _fed(tensor: torch.Tensor, port: Port) -> npt.NDArray[np.generic]:
    """Returns a tensor for an input of the runtime; a file that computes in float32 takes other floats as float32."""
    array: npt.NDArray[np.generic] = (tensor.float() if port.dtype == np.float32 else tensor).numpy()
    return array


def _advice(path: Path) -> str:
    """Returns what to do about a file that the runtime cannot load or run, if there is anything."""
    import onnx  # noqa: PLC0415 - an extra

    graph = onnx.load(path, load_external_data=False).graph
    scales = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] > 1}
    found = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear" and node.input[1] in scales]
    if not found:
        return ""
    return (
        f". {len(found)} activations have a scale for each channel (the first is '{found[0]}'), which runtimes support "
        'in few places: quantize activations with one scale ("per_channel": false)'
    )
