"""What leaves a training: a plain model, files for runtimes, a report. Methods of the controller."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from compress_core.data.forwards import without_traces
from compress_core.export import ExportReport, Options
from compress_core.export.exporter import chosen_target
from compress_core.export.sizes import DynamicShapes
from compress_core.session.batch_recorder import remove_recorders
from compress_core.session.exports import ModelExport, exporters
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.model_copies import copy_of, take_decisions
from compress_core.session.parts import ControllerParts
from compress_core.session.report import Reported, ReportOptions, write_report
from compress_core.transforms.activation import check_forwards
from compress_core.transforms.model_wide import bake_transforms
from compress_core.transforms.python_state import copied
from compress_core.transforms.wrapped_forward import drop_mixed_precision

if TYPE_CHECKING:
    from compress_core.session.controller import CompressionController


class ResultMethods(ControllerParts):
    """The methods of `CompressionController` that make something of the compressed model."""

    def strip(self, do_copy: bool = True, model: nn.Module | None = None) -> nn.Module:
        """Returns a plain model that computes the same, with transforms baked into its weights.

        Args:
            do_copy: Whether to work on a copy. Otherwise this model itself becomes plain, and the controller can no
                longer be used.
            model: A copy of the compressed model with other weights, such as an average (`ema.module`), to strip in
                place of the compressed model. What is not learned (masks, which quantizers are on) is taken from the
                compressed model, because averages do not follow it.

        Raises:
            UsageError: `model` is no copy of the compressed model.
        """
        lifecycle = self._inspected
        source = self.model if model is None else copy_of(self.model, model)
        if do_copy:
            return self._baked(lifecycle, source, copied(source))
        others = [] if source is self.model else [source]
        return self._transaction.run(lambda: self._baked(lifecycle, source, source), others, local=True)

    def _baked(self, lifecycle: Lifecycle, source: nn.Module, stripped: nn.Module) -> nn.Module:
        do_copy = stripped is not source
        if source is not self.model:
            take_decisions(stripped, self.model)
        if do_copy:
            drop_mixed_precision(stripped)
        else:
            check_forwards(stripped)
        # The copy shares classes, closures and caches with the model.
        with without_traces(self.model, parameters=False) if do_copy else contextlib.nullcontext():
            lifecycle.strip(stripped)
            bake_transforms(stripped)
        remove_recorders(stripped)
        self._stripped = not do_copy and source is self.model
        return stripped

    def export(
        self,
        path: str | os.PathLike[str],
        args: Any = None,
        *,
        target: str | None = None,
        tolerance: float | None = None,
        opset: int | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_batch: bool = True,
        dynamic_shapes: DynamicShapes | None = None,
        external_data: bool | None = None,
        verify: bool = True,
        by_layer: bool = False,
    ) -> ExportReport:
        """Writes the compressed model to a file for a runtime, after running it there and comparing it with torch.

        Without quantization the file contains the plain model that `strip` returns; with quantization, integer weights
        and the scales that the model has been trained with. The model is not changed.

        Args:
            path: The file; an existing file is replaced only after everything else has succeeded.
            args: Arguments of forward: a tensor, a tuple, or a dict of keyword arguments. By default a batch of the
                data that the model was created with, or `input_info`. Pass realistic inputs, so that the comparison
                is meaningful.
            target: Name of the runtime, a choice at `export.target`: `onnxruntime`, `openvino`, `tensorrt`,
                `executorch`, or what plugins add. By default the runtime that the config's `target_device` names, if it
                reads such files, and else the first that does.
            tolerance: Largest allowed mean absolute difference between the runtime and torch, divided by the mean
                absolute output of torch. It applies to each output, with the runtime's graph optimizations on and off.
                By default 0.05, or more if roundings that add up are the only reason: then each layer agrees within a
                step of its quantizer on torch's own activations, and a warning and a note in the report say so.
            opset: Version of ONNX's default operator set, at least 13; by default 21. Only for ONNX files. Operators
                that an older one lacks are an `ExportError`, which names them.
            input_names: Names of the inputs, in order; by default those of forward's arguments.
            output_names: Names of the outputs.
            dynamic_batch: Whether the file accepts any batch size. If the model does not, or computes something else
                on others, the file takes the batch size of `args` only, with a warning and a note in the report. If
                `dynamic_shapes` names dimension 0 of an input, or a dimension "batch", only what it names varies.
            dynamic_shapes: Further sizes that vary: for each input, names by dimension, such as
                `{"pixels": {2: "height", 3: "width"}, "ids": {1: "length"}}`; the same name means the same size. Inputs
                are named as forward's arguments, or as in `input_names`; a list has an entry for each argument. What
                the model does not take in other sizes has that of `args`, with a warning and a note in the report.
            external_data: Whether weights are written to a second file beside the first; by default if they take more
                than the 2 GB that one file holds. Only for ONNX files.
            verify: Whether to compare with torch, on two batch sizes, before the file is written.
            by_layer: Whether to compare each quantized tensor with torch, even if the outputs agree; the result is in
                `layers` of the report.

        Returns:
            The result of the comparison.

        Raises:
            ExportError: A package is missing (the message names the extra), the model cannot be exported, or the
                difference is larger than the tolerance. No file is left then.
            ExportFileError: The file cannot be written, which is a `FileError` as well; an existing one is as it was.
            DataError: There is no example input.
            UsageError: An option has an invalid value.
        """
        options = Options(
            tolerance,
            opset,
            input_names,
            output_names,
            dynamic_batch,
            verify,
            dynamic_shapes=dynamic_shapes,
            external_data=external_data,
            by_layer=by_layer,
        )
        device = self.context.config.root.target_device
        name = chosen_target(exporters(), target, Path(path), device)
        return ModelExport(self.model, self._inspected, "export").write(path, args, name, options)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        args: Any = None,
        *,
        tolerance: float | None = None,
        opset: int = 21,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_batch: bool = True,
        dynamic_shapes: DynamicShapes | None = None,
        external_data: bool | None = None,
        verify: bool = True,
    ) -> ExportReport:
        """Writes the compressed model to an ONNX file for ONNX Runtime; the file may have any ending.

        Arguments, result and errors are those of `export`.
        """
        options = Options(
            tolerance,
            opset,
            input_names,
            output_names,
            dynamic_batch,
            verify,
            dynamic_shapes=dynamic_shapes,
            external_data=external_data,
        )
        return ModelExport(self.model, self._inspected, "export_onnx").write(path, args, "onnxruntime", options)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        accuracy: Mapping[str, float] | None = None,
        evaluate_fn: Callable[[nn.Module], Any] | None = None,
        args: Any = None,
        latency: bool = True,
    ) -> None:
        """Writes a report of the compressed model as one HTML page, which needs neither a network nor JavaScript.

        Everything is measured on a copy: model, controller and random generators are as before. A batch of the
        calibration data is read for the inputs, and a few more for the histograms of activations.

        Of several processes rank 0 writes; all may call this, and all have to if `evaluate_fn` waits for the others.

        Args:
            path: The file, which ends in .html; it appears completely or not at all.
            title: The heading; by default the class of the model.
            accuracy: What you have measured, by step and in order: `{"float": 0.93, "compressed": 0.87}`.
            evaluate_fn: `evaluate_fn(model)`, returns a number. It is called with a copy of the compressed model, and
                of the uncompressed model if that is kept (see `Algorithm.needs_uncompressed`).
            args: Arguments of forward, as for `export`, to trace the network and to take the time of a forward with. By
                default a batch of the data that the model was created with, or `input_info`.
            latency: Whether to take the time of a forward, of the model before compression and stripped.

        Raises:
            ExportError: jinja2 is missing (`pip install 'compress-core[report]'`).
            FileError: The file cannot be written.
            UsageError: An argument has an invalid value.
        """
        options = ReportOptions(title, accuracy, evaluate_fn, args, latency)
        write_report(Reported(cast("CompressionController", self), self._inspected, self._uncompressed), path, options)
