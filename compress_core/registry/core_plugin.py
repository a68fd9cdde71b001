"""The choice points and choices of the core itself, registered like those of any plugin."""

from __future__ import annotations

from collections.abc import Callable

from compress_core.contract import sparsity_schedules
from compress_core.contract.choices import Choice, ChoicePoint, callable_choice
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.schedules import exponential_level
from compress_core.export import ExecuTorchExporter, Exporter, OnnxExporter, OpenVinoExporter, TensorRtExporter


def exponential(initial: float, target: float, duration: float) -> Callable[[float], float]:
    """Lets the density decay geometrically."""
    return lambda time: exponential_level(initial, target, time, duration)


@hookimpl
def compress_choice_points() -> list[ChoicePoint]:
    """Returns the choice points that do not belong to a single algorithm."""
    return [
        ChoicePoint(
            "level_schedule",
            "a function (initial, target, duration in epochs) -> function of the time in epochs -> level, pure, with "
            "`initial` at 0 and `target` from `duration` on",
            callable_choice,
        ),
        sparsity_schedules.POINT,
        ChoicePoint(
            "channels.rule",
            "a function (compress_core.channels.Step) -> labels of the results of the operator that the choice is "
            "named after, without overload: `my_library.my_operator`",
            callable_choice,
        ),
        ChoicePoint(
            "export.target",
            "an instance of a class derived from compress_core.export.Exporter, which writes the file of "
            "controller.export(path, target=...), runs it and compares it with torch",
            lambda value: None if isinstance(value, Exporter) else f"must be an Exporter, got {type(value).__name__}",
        ),
    ]


@hookimpl
def compress_choices() -> list[Choice]:
    """Returns the schedules that algorithms share, and the runtimes that files are written for."""
    return [
        *sparsity_schedules.CHOICES,
        Choice("level_schedule", "exponential", exponential),
        Choice("export.target", "onnxruntime", OnnxExporter(), "ONNX files for ONNX Runtime"),
        Choice("export.target", "openvino", OpenVinoExporter(), "ONNX files and IR for OpenVINO"),
        Choice("export.target", "tensorrt", TensorRtExporter(), "ONNX files for TensorRT"),
        Choice("export.target", "executorch", ExecuTorchExporter(), "programs for ExecuTorch's XNNPACK"),
    ]
