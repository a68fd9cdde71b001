"""Exports a prepared model to a program for ExecuTorch's XNNPACK: lowers it, runs it, and writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from compress_core.data.progress import progress
from compress_core.errors import ExportError, UsageError
from compress_core.export.agreement import DisagreementError, compared
from compress_core.export.executorch.layers import Quantizer, compare_parts, quantizers_of
from compress_core.export.executorch.program import graph_of, lowered, rewritten
from compress_core.export.executorch.runtime import Loaded, label
from compress_core.export.executorch.silence import import_executorch
from compress_core.export.executorch.work import operators_of, work_of
from compress_core.export.exporter import Exporter, ExportJob, Options
from compress_core.export.inputs import Inputs
from compress_core.export.notes import notes_on_large_layers, notes_on_values
from compress_core.export.references import Reference, return_only_tensors
from compress_core.export.report import Agreement, ExportReport, LayerAgreement, Work
from compress_core.export.target import ExportTarget
from compress_core.files import replaced_file
from compress_core.torch_internals import tree_map

METADATA_METHOD = "compress_core_export"
_TOLERANCE = 0.05
_LARGEST_BATCH = 32  # memory is reserved for it; at least twice the samples that are compared
_LAST_LAYERS = 0.01  # of the mean absolute output: what layers after the last quantizers may differ by


class ExecuTorchExporter(Exporter):
    """Writes programs for ExecuTorch's XNNPACK and runs them in its runtime.

    Programs take batches up to a fixed size, because ExecuTorch reserves memory in advance. If the model cannot be
    exported for several batch sizes, or computes something else on others, the program takes the batch size of the
    example only; the report and a warning say so.
    """

    name: ClassVar[str] = "ExecuTorch"
    format: ClassVar[str] = "executorch"
    suffixes: ClassVar[tuple[str, ...]] = (".pte",)
    devices: ClassVar[tuple[str, ...]] = ("ANY", "CPU", "xnnpack")
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"

    def check_installed(self) -> None:
        """Checks that ExecuTorch is installed and can be used; see `Exporter.check_installed`."""
        super().check_installed()
        import_executorch()

    def target(self, name: str, options: Options) -> ExportTarget:
        """Returns what algorithms are told; see `Exporter.target`."""
        for option in ("input_names", "output_names"):
            if getattr(options, option) is not None:
                raise UsageError(f"{option}: programs of ExecuTorch number their inputs and outputs; leave it out")
        return super().target(name, options)

    def export(self, job: ExportJob) -> ExportReport:
        """Writes the program; see `Exporter.export`."""
        return_only_tensors(job.model)
        replaced = _compute_in_float32(job.model)
        references = job.references
        reason = references.reason
        if references.resized:
            largest = max(_LARGEST_BATCH, references.own.inputs.batch_size)
            try:
                return _written(job, *_Run(self, job, largest, replaced).made(references.resized))
            except ExportError as error:
                if isinstance(error, DisagreementError) and error.batch_size == references.resized[0].inputs.batch_size:
                    raise
                reason = error.found if isinstance(error, DisagreementError) else str(error)
        own = references.own
        notes = (f"takes batches of {own.inputs.batch_size} only, because {reason}",) if reason else ()
        return _written(job, *_Run(self, job, None, replaced).made([own], notes))


@dataclass(frozen=True)
class _Run:
    """One attempt of an export.

    Attributes:
        exporter: For what.
        job: What is exported.
        largest_batch: Largest batch size that the program takes; None for that of the example only.
        replaced: The floating-point types that became float32.
    """

    exporter: ExecuTorchExporter
    job: ExportJob
    largest_batch: int | None
    replaced: tuple[str, ...]

    def made(self, references: Sequence[Reference], notes: tuple[str, ...] = ()) -> tuple[bytes, ExportReport]:
        """Returns the program and its report, after comparing it with the references, the first of which it is of."""
        job, options = self.job, self.job.options
        inputs = _in_float32(references[0].inputs)
        module = graph_of(job.model, inputs, largest_batch=self.largest_batch)
        quantizers = quantizers_of(module)
        rewritten(module, job.rewrites)
        if self.largest_batch is not None:
            notes = (_up_to(self.largest_batch), *notes)
        report = ExportReport(
            algorithms=job.algorithms,
            tolerance=_TOLERANCE if options.tolerance is None else options.tolerance,
            inputs=tuple(node.name for node in module.graph.nodes if node.op == "placeholder"),
            outputs=_output_names(module),
            notes=(*notes, *notes_on_values(references[0], self.replaced), *self.exporter.made_for_another(job)),
        )
        seen = _Seen()
        program = lowered(
            module,
            inputs,
            largest_batch=self.largest_batch,
            metadata={METADATA_METHOD: report.to_json()},
            look=seen.look,
        )
        report = replace(
            report,
            operators={**{f"xnnpack.{name}": number for name, number in seen.delegated.items()}, **seen.portable},
            work=seen.work,
            notes=(*report.notes, *notes_on_large_layers(seen.work, "XNNPACK", self.exporter.remedy(job))),
        )
        if options.verify:
            report = self._verified(report, program, module, quantizers, references)
        return program, report

    def _verified(
        self,
        report: ExportReport,
        program: bytes,
        module: fx.GraphModule,
        quantizers: Sequence[Quantizer],
        references: Sequence[Reference],
    ) -> ExportReport:
        loaded = Loaded(program)
        shown = progress(references, f"comparing with torch in {self.exporter.name}", unit="batch")
        agreements = [entry for reference in shown for entry in _agreements(loaded, reference, report.outputs)]
        operators = dict(report.operators)
        report = replace(report, runtime=label(), runtime_operators=operators, agreements=tuple(agreements))
        worst = report.worst()
        if worst is None or worst.relative_mean <= report.tolerance:
            if self.job.options.by_layer:
                report = replace(report, layers=self._explained(module, quantizers, references[0], report.outputs)[2])
            return report
        difference = (
            f"output '{worst.output}' of {report.runtime} differs from torch by {worst.relative_mean:.3g} of its mean "
            f"absolute value (largest difference: {worst.relative:.3g} of its largest value), on a batch of "
            f"{worst.batch_size}"
        )
        reference = next(entry for entry in references if entry.inputs.batch_size == worst.batch_size)
        advice, is_rounding, layers = self._explained(module, quantizers, reference, report.outputs)
        report = replace(report, layers=layers)
        if self.job.options.tolerance is not None or not is_rounding:
            kept = f"; tolerance is {report.tolerance:.3g}. No file was written. "
            raise DisagreementError(worst.batch_size, difference, kept + advice, "", report)
        return replace(report, notes=(*report.notes, f"is right, but its {difference}. {advice}"))

    def _explained(
        self, module: fx.GraphModule, quantizers: Sequence[Quantizer], reference: Reference, names: Sequence[str]
    ) -> tuple[str, bool, tuple[LayerAgreement, ...]]:
        """Returns what to say about a difference, whether roundings that add up are all there is, and the layers."""
        stripped = self.job.copies().checked(reference.inputs).stripped
        if self.replaced:
            stripped = stripped.float()
        found = compare_parts(module, quantizers, stripped, _in_float32(reference.inputs), names)
        if found is None:
            advice = (
                "If this is expected (an untrained network, inputs unlike the calibration data), pass realistic inputs "
                "as args, or a larger tolerance"
            )
            return advice, False, ()
        if found.departures:
            first = found.departures[0]
            what = "has another grid than in torch"
            if math.isfinite(first.steps):
                what = (
                    f"is {first.steps:.3g} steps away from what torch rounds, though computed from torch's own "
                    "activations"
                )
            advice = (
                f"The first tensor that departs is quantized at {first.place}: it {what}. This is more than rounding; "
                "name the layer before it in ignored_scopes, and report it"
            )
            return advice, False, found.layers
        worst = max(found.agreements, key=lambda agreement: agreement.relative_mean)
        if not worst.relative_mean <= _LAST_LAYERS:
            advice = (
                f"All {len(found.layers)} quantized tensors agree, but '{worst.output}', computed from torch's own "
                f"activations, differs by {worst.relative_mean:.3g}: it is the part after the last quantizers that "
                "departs"
            )
            return advice, False, found.layers
        advice = (
            f"Only roundings add up: each of its {len(found.layers)} quantized tensors agrees with torch within a step "
            "if it is computed from torch's own activations. Networks with random weights amplify roundings"
        )
        return advice, True, found.layers


@dataclass
class _Seen:
    """What is known of a program before its memory is planned.

    Attributes:
        work: Its layers and products.
        delegated: Operators that XNNPACK computes -> their number.
        portable: Operators that portable kernels compute -> their number.
    """

    work: tuple[Work, ...] = ()
    delegated: dict[str, int] = field(default_factory=dict)
    portable: dict[str, int] = field(default_factory=dict)

    def look(self, edge: Any) -> None:
        """Reads it from an `EdgeProgramManager`."""
        self.work = work_of(edge)
        self.delegated, self.portable = operators_of(edge)


def _agreements(loaded: Loaded, reference: Reference, names: Sequence[str]) -> list[Agreement]:
    inputs, size = _in_float32(reference.inputs), reference.inputs.batch_size
    outputs = loaded.run(inputs.tensors, size)
    if len(outputs) != len(reference.outputs):
        raise ExportError(f"the program has {len(outputs)} outputs, the model {len(reference.outputs)}")
    return compared(names, [entry.numpy() for entry in outputs], reference.outputs, size, True)


def _output_names(module: fx.GraphModule) -> tuple[str, ...]:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return tuple(f"output_{number}" for number in range(len(output.args[0])))


def _up_to(largest_batch: int) -> str:
    return f"takes batches of up to {largest_batch} samples, for which memory is reserved"


def _compute_in_float32(model: nn.Module) -> tuple[str, ...]:
    """Makes a model compute in float32, which XNNPACK does, and returns the names of the types that it had."""
    tensors = [*model.parameters(), *model.buffers()]
    others = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float32}
    if others:
        model.float()
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in others))


def _in_float32(inputs: Inputs) -> Inputs:
    def change(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = tree_map(change, (inputs.args, inputs.kwargs))
    return replace(inputs, args=args, kwargs=kwargs)


def _written(job: ExportJob, program: bytes, report: ExportReport) -> ExportReport:
    with replaced_file(job.path) as file:
        file.write(program)
    return replace(report, path=str(job.path), size=len(program))
