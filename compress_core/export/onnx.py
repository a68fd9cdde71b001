"""Exports a prepared model to ONNX: exports the graph, applies rewrites, verifies it, and writes the whole file."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.inputs import Inputs
from compress_core.export.layers import Cut, cut, quantizers_of, unrounded_difference
from compress_core.export.names import name_inputs_and_outputs
from compress_core.export.precision import compute_in_float32
from compress_core.export.program import exported_graph, quiet
from compress_core.export.references import Reference, References, return_only_tensors
from compress_core.export.report import ExportReport
from compress_core.export.target import GraphRewrite
from compress_core.export.verification import (
    DisagreementError,
    compare,
    compare_parts,
    optimized_operators,
    runtime_name,
)
from compress_core.files import replaced_file
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE
from compress_core.transforms.python_state import copied

logger = logging.getLogger(__name__)

METADATA_KEY = "compress_core.export"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OLDEST_OPSET = 21  # DequantizeLinear of int32, of 16 bits, and of any floating-point type
# Added to the error if the file agrees with torch without optimizations: then the integer kernels are the cause.
_SATURATION = (
    ". With the optimizations off they agree: on processors without VNNI instructions, integer kernels saturate when "
    "they add two products of 8 bits; weights on half-range grids (quantization's overflow_fix) prevent it"
)
_TOLERANCE = 0.05
_LAST_LAYERS = 0.01  # of the mean absolute output: what layers after the last quantizers may differ by
_STRIPPED = 1e-3  # of the mean absolute output: what a model may change by being stripped, in float64
_LARGEST_FILE = 2**31 - 1  # the limit of protobuf
_LARGEST_DUPLICATE = 16384  # elements: zero points of many channels, not weights


@dataclass(frozen=True)
class Options:
    """Options of an export; see `CompressionController.export_onnx`."""

    tolerance: float | None
    opset: int
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    dynamic_batch: bool
    verify: bool

    def __post_init__(self) -> None:
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or self.opset < _OLDEST_OPSET:
            raise UsageError(f"opset: {self.opset!r}: quantized models need an integer of {_OLDEST_OPSET} or more")
        if self.tolerance is not None and not (isinstance(self.tolerance, (int, float)) and self.tolerance >= 0):
            raise UsageError(f"tolerance: {self.tolerance!r} must be a number of at least 0")


def check_extras() -> None:
    """Checks that the packages that the export needs are installed.

    Raises:
        ExportError: A package is missing; the message says how to install it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}: pip install 'compress-core[onnx]'")


def check_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of the file to write, after checking it.

    Raises:
        UsageError: The path is a folder, or in a folder that does not exist.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"path: '{target}' must name a file in a folder that exists")
    return target


def export(
    model: nn.Module,
    path: Path,
    references: References,
    copies: Callable[[], Copies],
    rewrites: Iterable[GraphRewrite],
    algorithms: Sequence[str],
    options: Options,
) -> ExportReport:
    """Writes a prepared model to a file, after verifying that the file computes the same.

    If the model cannot be exported for any batch size, or computes something else on others, the file takes the batch
    size of the example only; the report and a warning say so.

    Args:
        model: The model in eval mode on the CPU, prepared by every algorithm.
        path: The file; an existing file is replaced.
        references: Batches and the outputs of the compressed model.
        copies: Returns copies for finding out where a file differs.
        rewrites: Changes of the graph by the algorithms, in order.
        algorithms: Names of the algorithms, for the report.
        options: All other options.

    Raises:
        ExportError: The model cannot be exported, or the file differs by more than the tolerance. No file is written,
            and an existing file is not changed.
        UsageError: The names do not fit the inputs or outputs.
    """
    return_only_tensors(model)
    job = _Job(model, copies, tuple(rewrites), tuple(algorithms), options)
    reason = references.reason
    if references.resized:
        try:
            return _written(path, *job.run(references.resized, is_dynamic=True))
        except ExportError as error:
            if isinstance(error, DisagreementError) and error.batch_size == references.resized[0].inputs.batch_size:
                raise
            reason = error.found if isinstance(error, DisagreementError) else str(error)
    graph, report = job.run([references.own], is_dynamic=False, notes=_fixed(references.own, reason))
    return _written(path, graph, report)


def _fixed(own: Reference, reason: str) -> tuple[str, ...]:
    """Returns what to say about a file for one batch size, if any batch size was wanted."""
    size = own.inputs.batch_size
    return (f"takes batches of {size} only, because {reason}",) if reason else ()


@dataclass(frozen=True)
class Copies:
    """Copies of the compressed model in eval mode on the CPU.

    Attributes:
        compressed: The model as it is.
        stripped: The model with the sizes and the transforms of activations that are exported.
    """

    compressed: nn.Module
    stripped: nn.Module

    def checked(self, inputs: Inputs) -> Copies:
        """Returns these copies, after comparing them.

        Raises:
            DisagreementError: They compute different things.
        """
        difference = unrounded_difference(copied(self.compressed), copied(self.stripped), inputs)
        if not difference <= _STRIPPED:
            found = (
                f"without quantizers of activations, the outputs of the model that is exported differ by "
                f"{difference:.3g} of their mean absolute value from those of the compressed model"
            )
            advice = "; an algorithm's compress_strip() or compress_export() changes what the model computes, report it"
            raise DisagreementError(inputs.batch_size, found, advice + ". No file was written")
        return self


@dataclass(frozen=True)
class _Job:
    """What is exported, and how."""

    model: nn.Module
    copies: Callable[[], Copies]
    rewrites: tuple[GraphRewrite, ...]
    algorithms: tuple[str, ...]
    options: Options

    def run(
        self, references: Sequence[Reference], *, is_dynamic: bool, notes: tuple[str, ...] = ()
    ) -> tuple[Any, ExportReport]:
        """Returns the graph and its report, after comparing it with the references; exported is the first of these."""
        options, inputs = self.options, references[0].inputs
        graph = exported_graph(self.model, inputs, opset=options.opset, is_dynamic=is_dynamic)
        quantizers = quantizers_of(graph)
        _forget_the_machine(graph)
        replaced = compute_in_float32(graph, with_double=_has_double_weights(self.model))
        for rewrite in self.rewrites:
            rewrite(graph)
        _drop_what_is_unused(graph)
        name_inputs_and_outputs(graph, options.input_names, options.output_names)
        report = ExportReport(
            opset=options.opset,
            algorithms=self.algorithms,
            tolerance=_TOLERANCE if options.tolerance is None else options.tolerance,
            inputs=tuple(str(value.name) for value in graph.graph.inputs),
            outputs=tuple(str(value.name) for value in graph.graph.outputs),
            operators=dict(sorted(Counter(node.op_type for node in graph.graph).items())),
            notes=(*notes, *_notes(references[0], replaced)),
        )
        if options.verify:
            serialized = _serialized(graph)

            def cut_for(reference: Reference) -> Cut | None:
                stripped = self.copies().checked(reference.inputs).stripped
                return cut(serialized, quantizers, stripped, reference.inputs)

            report = _verified(report, serialized, references, cut_for, options.tolerance is not None)
        return graph, report


def _notes(reference: Reference, replaced: Sequence[str]) -> Iterator[str]:
    if replaced:
        kinds = " and ".join(replaced)
        yield f"computes in float32, inputs and outputs included, where the model computes in {kinds}"
    if constants := reference.inputs.constants():
        yield f"holds as constants what is no tensor: {', '.join(constants)}"
    if reference.dropped:
        yield f"leaves out what is no tensor: {', '.join(reference.dropped)}"


def _has_double_weights(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in model.parameters())


def _written(path: Path, graph: Any, report: ExportReport) -> ExportReport:
    for note in report.notes:
        logger.warning("%s %s", path, note)
    graph.metadata_props[METADATA_KEY] = report.to_json()
    serialized = _serialized(graph)
    with replaced_file(path) as file:
        file.write(serialized)
    return replace(report, path=str(path), size=len(serialized))


def _drop_what_is_unused(graph: Any) -> None:
    """Removes nodes that nothing reads, and duplicate initializers."""
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass  # noqa: PLC0415 - an extra

    RemoveUnusedNodesPass()(graph)
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.graph.initializers[name]
    with quiet():
        DeduplicateInitializersPass(_LARGEST_DUPLICATE)(graph)
    for name in list(graph.graph.initializers):
        # The internal location of transforms is of no interest to readers of the file.
        short = f".{name}".replace(f".{ACTIVATIONS_ATTRIBUTE}.", ".")[1:]
        if short not in graph.graph.initializers:
            graph.graph.initializers[name].name = short


def _forget_the_machine(graph: Any) -> None:
    """Removes the exporter's metadata of each node: stack traces with paths. Metadata of later rewrites stays."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
    graph.producer_name, graph.doc_string = "compress-core", None


def _serialized(graph: Any) -> bytes:
    import onnx_ir  # noqa: PLC0415 - an extra

    proto = onnx_ir.to_proto(graph)
    size = proto.ByteSize()
    if size > _LARGEST_FILE:
        raise ExportError(f"the model takes {size / 1e9:.1f} GB, and one ONNX file holds 2 GB at most")
    serialized: bytes = proto.SerializeToString()
    return serialized


def _verified(
    report: ExportReport,
    serialized: bytes,
    references: Sequence[Reference],
    cut_for: Callable[[Reference], Cut | None],
    is_strict: bool,
) -> ExportReport:
    agreements = [a for optimized in (False, True) for a in compare(serialized, references, optimized=optimized)]
    report = replace(
        report,
        runtime=runtime_name(),
        runtime_operators=optimized_operators(serialized),
        agreements=tuple(agreements),
    )
    notes: dict[float, str] = {}
    for optimized in (False, True):
        worst = report.worst(optimized=optimized)
        if worst is None or worst.relative_mean <= report.tolerance:
            continue
        difference = (
            f"output '{worst.output}' of {report.runtime} (graph optimizations {'on' if optimized else 'off'}) "
            f"differs from torch by {worst.relative_mean:.3g} of its mean absolute value (largest difference: "
            f"{worst.relative:.3g} of its largest value), on a batch of {worst.batch_size}"
        )
        reference = next(entry for entry in references if entry.inputs.batch_size == worst.batch_size)
        advice, is_rounding = _explained(cut_for(reference), reference, optimized)
        if is_strict or not is_rounding:
            kept = f"; tolerance is {report.tolerance:.3g}. No file was written. "
            raise DisagreementError(worst.batch_size, difference, kept + advice)
        notes.setdefault(worst.relative_mean, f"is right, but its {difference}. {advice}")
    return replace(report, notes=(*report.notes, *(notes[most] for most in sorted(notes)[-1:])))


def _explained(cut: Cut | None, reference: Reference, optimized: bool) -> tuple[str, bool]:
    """Returns what to say about a file that differs from torch, and whether roundings that add up are all there is."""
    if cut is None:
        advice = (
            "If this is expected (an untrained network, inputs unlike the calibration data), pass realistic inputs as "
            "args, or a larger tolerance"
        )
        return advice + (_SATURATION if optimized else ""), False
    agreements, departures = compare_parts(cut, reference, optimized=optimized)
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
        "is computed from torch's own activations. Untrained networks, and inputs unlike the calibration data, amplify "
        "roundings: pass realistic inputs as args",
        True,
    )
