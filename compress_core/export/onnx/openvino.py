"""Writes ONNX files and OpenVINO IR for OpenVINO."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

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

    def adapt(self, graph: Any) -> None:
        """Adds biases of convolutions after them: OpenVINO loses some of those inside if the batch size varies.

        Seen with OpenVINO 2026.4: a convolution with a bias, whose quantized output is concatenated with a tensor that
        is expanded to the batch size (a class token), got the bias of its first channel in all channels.
        """
        separate_biases(graph.graph)

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
        report = replace(report, agreements=tuple(compare(runtime, xml, own, {}, optimized=runtime.levels[-1])))
        before, now = report.tolerance, report.worst()
        if now is not None and not now.relative_mean <= before and not any("is right" in note for note in report.notes):
            found = (
                f"output '{now.output}' of the IR differs from torch by {now.relative_mean:.3g} of its mean absolute"
            )
            advice = " value, and the ONNX file that it is made from does not. No file was written; export to .onnx"
            raise DisagreementError(now.batch_size, found, advice, now.sizes, report)
        return report


def separate_biases(graph: Any) -> None:
    """Replaces the constant bias of each convolution by an addition behind it, which OpenVINO fuses again.

    Args:
        graph: An `onnx_ir.Graph`; it is changed.
    """
    import onnx_ir  # noqa: PLC0415 - an extra

    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        values, rank = _constant(node.inputs[2]), node.inputs[1].shape
        if values is None or rank is None:
            continue
        name = f"{node.name}.bias"
        tensor = onnx_ir.tensor(values.reshape(1, -1, *[1] * (len(rank) - 2)), name=name)
        bias = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(tensor.numpy().shape),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.initializers[name] = bias
        node.replace_input_with(2, None)
        node.resize_inputs(2)
        result = node.outputs[0]
        addition = onnx_ir.node("Add", [result, bias], name=f"{node.name}.add")
        total = addition.outputs[0]
        total.shape, total.type, total.name = result.shape, result.type, result.name
        result.name = f"{result.name}.without_bias"
        graph.insert_after(node, addition)
        if result.is_graph_output():
            graph.outputs[list(graph.outputs).index(result)] = total
        result.replace_all_uses_with(total)
        addition.replace_input_with(0, result)


def _constant(value: Any) -> npt.NDArray[np.floating[Any]] | None:
    """Returns the values of a constant in float32, also of one that is stored as integers."""
    maker = value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        integers, scale = (_constant_array(entry) for entry in maker.inputs[:2])
        has_zero_point = len(maker.inputs) > 2 and maker.inputs[2] is not None
        if integers is None or scale is None or has_zero_point:
            return None
        product: npt.NDArray[np.floating[Any]] = (integers * scale.astype(np.float64)).astype(np.float32)
        return product
    found: npt.NDArray[np.floating[Any]] | None = _constant_array(value)
    return found


def _constant_array(value: Any) -> Any:
    return None if value.const_value is None else value.const_value.numpy()


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
