"""Runs an ONNX file in a runtime, compares its outputs with those of the model in torch, and explains differences."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compress_core.data.progress import progress
from compress_core.errors import ExportError
from compress_core.export.agreement import DisagreementError, RunError, compared
from compress_core.export.notes import notes_on_large_layers
from compress_core.export.onnx.layers import Cut, tapped
from compress_core.export.onnx.work import Execution, work_of
from compress_core.export.references import Reference
from compress_core.export.report import Agreement, ExportReport, LayerAgreement
from compress_core.export.runtimes.runtime import Array, Port, Runtime, RuntimeSession

# Added to the error if the file agrees with torch without optimizations: then the integer kernels are the cause.
_SATURATION = (
    ". With the optimizations off they agree: on processors without VNNI instructions, integer kernels saturate when "
    "they add two products of 8 bits; weights on half-range grids (quantization's overflow_fix) prevent it"
)
# What every runtime has, and errors mention in passing.
_EVERYWHERE = frozenset(["Conv", "MatMul", "Add", "Mul", "Cast", "Constant", "If", "Loop"])
# One layer multiplies the mean difference of its input by less than this: a few at most with random weights.
_LARGEST_JUMP = 20.0
_LEAST_STEPS = 0.05
_LAST_LAYERS = 0.01  # of the mean absolute output: what layers after the last quantizers may differ by


@dataclass(frozen=True)
class Candidate:
    """A file that is to be verified.

    Attributes:
        path: The file.
        runtime: What runs it.
        references: Batches with the outputs of torch.
        cut_for: Returns the file cut behind its quantizers, for a batch; None if that is not possible.
        places: Name of a node -> the module that it was exported from.
        remedy: What to do about layers that are not computed in integers, to be appended.
    """

    path: Path
    runtime: Runtime
    references: Sequence[Reference]
    cut_for: Callable[[Reference], Cut | None]
    places: Mapping[str, str]
    remedy: str = ""


def verified(report: ExportReport, candidate: Candidate, *, is_strict: bool, by_layer: bool) -> ExportReport:
    """Returns a report with the comparison of a file and torch.

    Args:
        report: The report so far.
        candidate: The file.
        is_strict: Whether the tolerance holds although only roundings add up.
        by_layer: Whether to compare each layer even if the outputs agree.

    Raises:
        ExportError: The runtime cannot load or run the file, or it differs by more than the tolerance.
    """
    runtime, references = candidate.runtime, candidate.references
    levels = runtime.levels
    agreements = [
        a for on in levels for a in compare(runtime, candidate.path, references, candidate.places, optimized=on)
    ]
    report = _with_work(replace(report, runtime=runtime.label, agreements=tuple(agreements)), candidate)
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
        advice, is_rounding, layers = _explained(candidate, reference, optimized)
        report = replace(report, layers=layers)
        if is_strict or not is_rounding:
            kept = f"; tolerance is {report.tolerance:.3g}. No file was written. "
            raise DisagreementError(worst.batch_size, difference, kept + advice, worst.sizes, report)
        notes.setdefault(worst.relative_mean, f"is right, but its {difference}. {advice}")
    if by_layer and not report.layers:
        report = replace(report, layers=_explained(candidate, references[0], levels[-1])[2])
    return replace(report, notes=(*report.notes, *(notes[most] for most in sorted(notes)[-1:])))


def _with_work(report: ExportReport, candidate: Candidate) -> ExportReport:
    """Returns the report with what the runtime has executed."""
    if not candidate.runtime.profiles:
        return report
    reference = candidate.references[0]
    execution = Execution.of(candidate.path, candidate.runtime, lambda session: feeds_of(session, reference))
    work = work_of(execution, candidate.places)
    operators = dict(sorted(Counter(entry.operator for entry in execution.executed).items()))
    notes = notes_on_large_layers(work, report.runtime, candidate.remedy)
    return replace(report, runtime_operators=operators, work=work, notes=(*report.notes, *notes))


def _explained(
    candidate: Candidate, reference: Reference, optimized: bool
) -> tuple[str, bool, tuple[LayerAgreement, ...]]:
    """Returns what to say about a file that differs from torch, whether roundings are all there is, and its layers."""
    cut = candidate.cut_for(reference)
    if cut is None:
        advice = (
            "If this is expected (an untrained network, inputs unlike the calibration data), pass realistic inputs as "
            "args, or a larger tolerance"
        )
        return advice + (_SATURATION if optimized else ""), False, ()
    agreements, layers = compare_parts(candidate, cut, reference, optimized=optimized)
    departures = [layer for layer, part in zip(layers, cut.parts, strict=True) if not layer.steps <= part.largest]
    if departures:
        first = departures[0]
        what = "has another scale than in torch"
        if math.isfinite(first.steps):
            what = (
                f"is {first.steps:.3g} steps away from what torch rounds, though computed from torch's own activations"
            )
        return (
            f"The first tensor that departs is quantized at {first.place}: it {what}. This is more than rounding; name "
            "the layer before it in ignored_scopes" + (_SATURATION if optimized else ", and report it"),
            False,
            layers,
        )
    jump = _jump(layers)
    if jump is not None:
        return (
            f"All {len(cut.parts)} quantized tensors agree if each is computed alone, but in the whole file the one at "
            f"{jump.place} is {jump.accumulated:.3g} steps away in the mean, and those before it are not: "
            f"{candidate.runtime.name} computes something else when it optimizes the whole graph. Name the layer "
            "before it in ignored_scopes, or use another runtime",
            False,
            layers,
        )
    worst = max(agreements, key=lambda agreement: agreement.relative_mean)
    if not worst.relative_mean <= _LAST_LAYERS:
        return (
            f"All {len(cut.parts)} quantized tensors agree, but '{worst.output}', computed from torch's own "
            f"activations, differs by {worst.relative_mean:.3g}: it is the part after the last quantizers that departs"
            + (_SATURATION if optimized else ""),
            False,
            layers,
        )
    return (
        f"Only roundings add up: each of its {len(cut.parts)} quantized tensors agrees with torch within a step if it "
        "is computed from torch's own activations. Networks with random weights amplify roundings",
        True,
        layers,
    )


def _jump(layers: Sequence[LayerAgreement]) -> LayerAgreement | None:
    """Returns the first tensor whose difference in the whole file cannot come from the roundings before it."""
    before = _LEAST_STEPS
    for layer in layers:
        if layer.accumulated is None:
            continue
        if layer.accumulated > max(1.0, _LARGEST_JUMP * before):
            return layer
        before = max(before, layer.accumulated)
    return None


def compare(
    runtime: Runtime, path: Path, references: Sequence[Reference], places: Mapping[str, str], *, optimized: bool
) -> list[Agreement]:
    """Runs a file and returns how its outputs differ from those in torch.

    Args:
        runtime: What runs it.
        path: The file.
        references: Batches with the outputs of torch.
        places: Name of a node -> the module that it was exported from.
        optimized: Whether the runtime may optimize the graph.

    Raises:
        ExportError: The runtime cannot load or run the graph, or its outputs differ in number or shape.
    """
    try:
        session = runtime.load(path, optimized=optimized)
    except Exception as error:
        said = str(error).strip()
        advice = _advice(path) or _unsupported(path, said, places)
        raise ExportError(f"{runtime.label} cannot load what was exported: {said}{advice}") from error
    try:
        what = f"comparing with torch in {runtime.label}, graph optimizations {'on' if optimized else 'off'}"
        shown = progress(references, what, unit="batch")
        return [agreement for reference in shown for agreement in _agreements(session, reference, optimized)]
    except RunError as error:
        message = f"{runtime.label} cannot run what was exported on {error.found}: {str(error.__cause__).strip()}"
        raise RunError(error.batch_size, message, _advice(path), error.sizes) from error.__cause__


def compare_parts(
    candidate: Candidate, cut: Cut, reference: Reference, *, optimized: bool
) -> tuple[list[Agreement], tuple[LayerAgreement, ...]]:
    """Runs the parts of a graph on what torch computes, and returns how they differ from torch.

    Args:
        candidate: The file.
        cut: The file, cut behind its quantizers.
        reference: The batch for which it was cut, with the outputs of torch.
        optimized: Whether the runtime may optimize the graph.

    Returns:
        The comparison of each output, and of each quantizer.
    """
    runtime, size = candidate.runtime, reference.inputs.batch_size
    session = runtime.load(cut.path, optimized=optimized)
    own = len(session.outputs) - len(cut.parts)
    outputs = session.run(feeds_of(session, reference) | cut.feeds)
    whole = runtime.load(tapped(candidate.path, cut), optimized=optimized)
    accumulated = cut.accumulated(whole.run(feeds_of(whole, reference))[own:])
    layers = tuple(
        LayerAgreement(part.place, steps, total)
        for part, steps, total in zip(cut.parts, cut.distances(outputs[own:]), accumulated, strict=True)
    )
    return compared(session.outputs[:own], outputs[:own], cut.outputs, size, optimized), layers


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


def _unsupported(path: Path, said: str, places: Mapping[str, str]) -> str:
    """Returns what to do about an operator that the runtime does not have, if its error names one."""
    import onnx  # noqa: PLC0415 - an extra

    graph = onnx.load(path, load_external_data=False).graph
    words = {*re.findall(r"[\w./:-]+", said), *re.findall(r"\w+", said)}
    named = [node for node in graph.node if node.name in words]
    found = named or [node for node in graph.node if node.op_type in words and node.op_type not in _EVERYWHERE]
    if not found:
        return ""
    node = found[0]
    place = f", from '{places[node.name]}'," if node.name in places else ""
    return (
        f". The operator {node.op_type}{place} is what it does not take here; if its inputs are quantized, name the "
        "module in ignored_scopes, else write it with other operators"
    )
