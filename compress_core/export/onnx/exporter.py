"""Exports a prepared model to an ONNX file: exports the graph, applies rewrites, verifies it, and writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.agreement import DisagreementError, RunError
from compress_core.export.exporter import Exporter, ExportJob, Options
from compress_core.export.inputs import BATCH
from compress_core.export.notes import notes_on_values
from compress_core.export.onnx import opsets
from compress_core.export.onnx.cleaning import drop_what_is_unused, forget_the_machine
from compress_core.export.onnx.files import draft_folder, drafted, written
from compress_core.export.onnx.layers import Cut, cut, places_of, quantizers_of
from compress_core.export.onnx.names import name_inputs_and_outputs
from compress_core.export.onnx.onnxruntime import repeat_grids
from compress_core.export.onnx.precision import compute_in_float32
from compress_core.export.onnx.program import FixedSizeError, exported_graph
from compress_core.export.onnx.verification import Candidate, verified
from compress_core.export.onnx.zeros import zeros_of
from compress_core.export.references import Reference, References, return_only_tensors
from compress_core.export.report import ExportReport
from compress_core.export.runtimes.onnxruntime import OnnxRuntime
from compress_core.export.runtimes.runtime import Runtime
from compress_core.export.target import ExportTarget

METADATA_KEY = "compress_core.export"
_TOLERANCE = 0.05


class OnnxExporter(Exporter):
    """Writes ONNX files and runs them in ONNX Runtime; the base of what other readers of ONNX files need.

    If the model cannot be exported for any batch size, or computes something else on others, the file takes the batch
    size of the example only; the report and a warning say so.
    """

    name: ClassVar[str] = "ONNX"
    format: ClassVar[str] = "onnx"
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    devices: ClassVar[tuple[str, ...]] = ("ANY", "CPU", "onnxruntime-cpu")
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"

    runtime: Runtime = OnnxRuntime()

    def target(self, name: str, options: Options) -> ExportTarget:
        """Returns what algorithms are told; see `Exporter.target`."""
        opset = opsets.USUAL if options.opset is None else options.opset
        if isinstance(opset, bool) or not isinstance(opset, int) or opset < opsets.OLDEST:
            raise UsageError(
                f"opset: {opset!r}: must be an integer of {opsets.OLDEST} or more, which have a scale for each channel"
            )
        return ExportTarget(self.format, opset, name)

    def export(self, job: ExportJob) -> ExportReport:
        """Writes the file; see `Exporter.export`."""
        return_only_tensors(job.model)
        with draft_folder() as folder:
            run = _Run(job, self, self.target("", job.options).opset, folder / "model.onnx")
            made = self._made(run)
            return _written(job.path, made)

    def runtime_for(self, job: ExportJob) -> Runtime:
        """Returns what runs the file."""
        return self.runtime

    def adapt(self, graph: Any) -> None:
        """Changes a graph, an `onnx_ir.Model`, into one that the runtime computes right, and in integers."""
        repeat_grids(graph.graph)

    def check_graph(self, graph: Any, job: ExportJob) -> tuple[str, ...]:
        """Checks what the runtime demands of a graph, beside running it.

        Args:
            graph: An `onnx_ir.Model`.
            job: What is exported.

        Returns:
            What to say about it in the report.

        Raises:
            ExportError: The runtime would refuse the graph, or compute something else.
        """
        return ()

    @staticmethod
    def _made(run: _Run) -> _Made:
        """Returns the graph and its report, for all sizes that can vary."""
        references = run.job.references
        sizes = _VaryingSizes.of(references)
        while sizes.names or sizes.is_dynamic:
            try:
                made = run.made(sizes.references, sizes)
            except ExportError as error:
                sizes = sizes.without_blamed(error)
                continue
            if sizes.doubt is None:
                return made
            sizes = sizes.without(sizes.names, sizes.doubt)  # each size may vary, but not all at once
        return run.made([references.own], sizes)


@dataclass(frozen=True)
class _VaryingSizes:
    """The sizes that an export tries to leave open.

    Attributes:
        found: All references.
        names: Names of sizes.
        is_dynamic: Whether the batch size varies although nobody has named it.
        notes: What to say about the others.
        doubt: What goes wrong if all sizes are others at once; what is left out until each of them has been tried.
    """

    found: References
    names: tuple[str, ...]
    is_dynamic: bool
    notes: tuple[str, ...]
    doubt: ExportError | None = None

    @classmethod
    def of(cls, found: References) -> _VaryingSizes:
        names = () if found.named is None else found.named.names
        fixed = (_fixed(BATCH, found.own, found.reason),) if found.reason else ()
        return cls(found, names, bool(found.resized), (*found.fixed, *fixed))

    @property
    def first(self) -> Reference:
        """What is exported."""
        if self.is_dynamic:
            return self.found.resized[0]
        return self.found.own if self.found.named is None else self.found.named.base

    @property
    def references(self) -> list[Reference]:
        """What is exported, and what is compared in addition."""
        batches = self.found.resized if self.is_dynamic else (self.first,)
        most = 1 if self.doubt is not None else len(self.names)
        return [*batches, *(reference for names, reference in self._others if len(names) <= most)]

    @property
    def _others(self) -> list[tuple[tuple[str, ...], Reference]]:
        others = () if self.found.named is None else self.found.named.others
        return [entry for entry in others if set(entry[0]) <= set(self.names)]

    def without_blamed(self, error: ExportError) -> _VaryingSizes:
        """Returns the sizes that are left after an error.

        Raises:
            ExportError: The error has nothing to do with sizes that vary.
        """
        blamed = self._blamed(error)
        if isinstance(error, DisagreementError) and len(blamed) > 1 and BATCH not in blamed and self.doubt is None:
            return replace(self, doubt=error)
        return self.without(blamed, error)

    def without(self, blamed: tuple[str, ...], error: ExportError) -> _VaryingSizes:
        """Returns the other sizes, with notes on these."""
        reason = error.found if isinstance(error, DisagreementError) else str(error)
        own = self.found.own
        for entry in own.inputs.varying:
            # A file of one size takes that of the example.
            if entry.name in blamed and own.inputs.size_of(entry) != self.first.inputs.size_of(entry):
                blamed = (*self.names, *blamed)
        names = tuple(name for name in self.names if name not in blamed)
        is_dynamic = self.is_dynamic and BATCH not in blamed
        found = replace(self.found, named=self.found.named if names else None)
        sizes = [*(name for name in self.names if name in blamed), *([BATCH] if self.is_dynamic > is_dynamic else [])]
        notes = (*self.notes, *(_fixed(name, own, reason) for name in sizes))
        return _VaryingSizes(found, names, is_dynamic, notes)

    def _blamed(self, error: ExportError) -> tuple[str, ...]:
        everything = self.names or (BATCH,)
        if not isinstance(error, DisagreementError):
            known = error.names if isinstance(error, FixedSizeError) else ()
            return known or everything
        place = error.batch_size, error.sizes
        for names, reference in self._others:
            if place == (reference.inputs.batch_size, reference.inputs.label):
                return names
        if place == (self.first.inputs.batch_size, self.first.inputs.label):
            if isinstance(error, RunError):  # it may run with the sizes of the example
                return (*self.names, BATCH)
            raise error
        return (BATCH,)


def _fixed(name: str, own: Reference, reason: str) -> str:
    """Returns what to say about a size that does not vary."""
    entry = next((entry for entry in own.inputs.varying if entry.name == name), None)
    if entry is None:
        return f"takes batches of {own.inputs.batch_size} only, because {reason}"
    return f"takes {name} of {own.inputs.size_of(entry)} only, because {reason}"


@dataclass(frozen=True)
class _Run:
    """One export.

    Attributes:
        job: What is exported.
        exporter: For what.
        opset: Version of the operator set.
        file: Where the file is written before it is verified.
    """

    job: ExportJob
    exporter: OnnxExporter
    opset: int
    file: Path

    def made(self, references: Sequence[Reference], sizes: _VaryingSizes) -> _Made:
        """Returns the graph and its report, after comparing it with the references; exported is the first of these."""
        job, options, inputs = self.job, self.job.options, references[0].inputs
        inputs = replace(inputs, varying=tuple(entry for entry in inputs.varying if entry.name in sizes.names))
        graph, ranges = exported_graph(
            job.model, inputs, opset=max(self.opset, opsets.OLDEST_OF_TORCH), is_dynamic=sizes.is_dynamic
        )
        quantizers, places = quantizers_of(graph), places_of(graph)
        forget_the_machine(graph)
        replaced = compute_in_float32(graph, with_double=_has_double_weights(job.model))
        for rewrite in job.rewrites:
            rewrite(graph)
        self.exporter.adapt(graph)
        drop_what_is_unused(graph)
        name_inputs_and_outputs(graph, options.input_names, options.output_names)
        opsets.use_opset(graph, self.opset)
        rules = (*self.exporter.made_for_another(job), *self.exporter.check_graph(graph, job))
        report = ExportReport(
            opset=self.opset,
            algorithms=job.algorithms,
            tolerance=_TOLERANCE if options.tolerance is None else options.tolerance,
            inputs=tuple(str(value.name) for value in graph.graph.inputs),
            outputs=tuple(str(value.name) for value in graph.graph.outputs),
            operators=dict(sorted(Counter(node.op_type for node in graph.graph).items())),
            notes=(*sizes.notes, *ranges, *_notes(references[0], replaced), *rules),
            zeros=zeros_of(graph),
        )
        name = job.path.resolve().name
        draft = drafted(graph, self.file, name, external=options.external_data, write=options.verify)
        if options.verify:
            opsets.check_file(self.file, self.opset)

            def cut_for(reference: Reference) -> Cut | None:
                stripped = job.copies().checked(reference.inputs).stripped
                return cut(self.file, quantizers, stripped, reference.inputs)

            runtime, remedy = self.exporter.runtime_for(job), self.exporter.remedy(job)
            candidate = Candidate(self.file, runtime, references, cut_for, places, remedy)
            is_strict = options.tolerance is not None
            report = verified(report, candidate, is_strict=is_strict, by_layer=options.by_layer)
        return _Made(graph, report, draft.data)


@dataclass(frozen=True)
class _Made:
    """What an export has made.

    Attributes:
        graph: The graph, an `onnx_ir.Model`.
        report: Its report.
        data: The draft of the file of its weights, if they have one.
    """

    graph: Any
    report: ExportReport
    data: Path | None


def _notes(reference: Reference, replaced: Sequence[str]) -> Iterator[str]:
    yield from notes_on_values(reference, replaced)
    for number, tensor in enumerate(reference.outputs):
        if tensor.is_floating_point() and (found := int(tensor.isnan().sum())):
            yield f"returns NaN, as torch does: {found} of {tensor.numel()} values of output {number} on the example"


def _has_double_weights(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in model.parameters())


def _written(path: Path, made: _Made) -> ExportReport:
    report, target = made.report, path.resolve()
    if made.data is not None and target.parent != path.parent.resolve():
        note = f"has weights in a file beside it, so it can be read as '{target}', and not through the link"
        report = replace(report, notes=(*report.notes, note))
    made.graph.metadata_props[METADATA_KEY] = report.to_json()
    data, size = written(path, made.graph, made.data)
    return replace(report, path=str(path), size=size, data_path="" if data is None else str(data))
