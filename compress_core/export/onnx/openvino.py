"""Writes ONNX files and OpenVINO IR for OpenVINO."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from compress_core.errors import ExportError
from compress_core.export.agreement import DisagreementError
from compress_core.export.exporter import ExportJob
from compress_core.export.onnx.exporter import METADATA_KEY, OnnxExporter
from compress_core.export.onnx.verification import compare
from compress_core.export.report import ExportReport
from compress_core.export.runtimes.openvino import OpenVino
from compress_core.export.runtimes.runtime import Runtime
from compress_core.files import replaced_file

# What is compared on the CPU then, where integer kernels may saturate as those of the device do not.
_NOT_CPU = ("GPU", "NPU")


class _WithoutIntegers(OpenVino):
    """OpenVINO as a reference for devices that are not there."""

    levels: ClassVar[tuple[bool, ...]] = (False,)
    profiles: ClassVar[bool] = False


class OpenVinoExporter(OnnxExporter):
    """Writes ONNX files or OpenVINO IR, and runs them in OpenVINO.

    IR is a pair of files, `model.xml` and `model.bin` with the weights. Each of them is replaced as a whole, the
    weights first.
    """

    name: ClassVar[str] = "OpenVINO"
    suffixes: ClassVar[tuple[str, ...]] = (".onnx", ".xml")
    devices: ClassVar[tuple[str, ...]] = ("ANY", "CPU", "GPU", "NPU", "openvino-cpu")
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra: ClassVar[str] = "openvino"

    runtime = OpenVino()

    def runtime_for(self, job: ExportJob) -> Runtime:
        """Returns what runs the file; see `OnnxExporter.runtime_for`."""
        return _WithoutIntegers() if job.target_device in _NOT_CPU else self.runtime

    def check_graph(self, graph: Any, job: ExportJob) -> tuple[str, ...]:
        """Returns how the file is compared, if not as it is deployed; see `OnnxExporter.check_graph`."""
        if not job.options.verify or job.target_device not in _NOT_CPU:
            return ()
        return (
            f"was run on the CPU without integer kernels, because it is made for target_device '{job.target_device}'",
        )

    def export(self, job: ExportJob) -> ExportReport:
        """Writes the file, or the pair of files; see `Exporter.export`."""
        if job.path.suffix.lower() != ".xml":
            return super().export(job)
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            report = super().export(replace(job, path=onnx))
            xml = _converted(onnx, report)
            if job.options.verify:
                report = self._compared(xml, job, report)
            weights = xml.with_suffix(".bin")
            for source, path in ((weights, job.path.with_suffix(".bin")), (xml, job.path)):
                with source.open("rb") as read, replaced_file(path) as file:
                    shutil.copyfileobj(read, file)
            return replace(report, path=str(job.path), size=weights.stat().st_size + xml.stat().st_size)

    def _compared(self, xml: Path, job: ExportJob, report: ExportReport) -> ExportReport:
        """Returns the report with the comparison of the IR, which is what the user gets."""
        sizes = {agreement.batch_size for agreement in report.agreements}
        runtime = self.runtime_for(job)
        own = [job.references.own] if len(sizes) == 1 else list(job.references.resized)
        report = replace(report, agreements=tuple(compare(runtime, xml, own, optimized=runtime.levels[-1])))
        before, now = report.tolerance, report.worst()
        if now is not None and not now.relative_mean <= before and not any("is right" in note for note in report.notes):
            found = (
                f"output '{now.output}' of the IR differs from torch by {now.relative_mean:.3g} of its mean absolute"
            )
            advice = " value, and the ONNX file that it is made from does not. No file was written; export to .onnx"
            raise DisagreementError(now.batch_size, found, advice, report)
        return report


def _converted(onnx: Path, report: ExportReport) -> Path:
    """Converts an ONNX file to IR beside it; returns its path."""
    import openvino  # noqa: PLC0415 - an extra

    xml = onnx.with_suffix(".xml")
    try:
        model: Any = openvino.Core().read_model(str(onnx))
        model.set_rt_info(report.to_json(), METADATA_KEY)
        # Weights that are integers stay; float16 would be another model than the one that was compared.
        openvino.save_model(model, str(xml), compress_to_fp16=False)
    except Exception as error:
        raise ExportError(f"OpenVINO cannot convert the model to IR: {str(error).strip()}") from error
    return xml
