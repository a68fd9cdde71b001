"""Exports the model of a controller: copies it, lets the algorithms prepare it, and hands it to an exporter."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress_core.contract.choices import choices_of
from compress_core.data.examples import examples_of
from compress_core.data.forwards import without_traces
from compress_core.export import Exporter, ExportJob, ExportReport, Options
from compress_core.export.exporter import Copies, check_path
from compress_core.export.files import export_errors
from compress_core.export.inputs import inputs_of
from compress_core.export.references import references_of
from compress_core.export.sizes import with_varying_sizes
from compress_core.session.batch_recorder import remove_recorders
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.unfinished import unfinished
from compress_core.transforms.model_wide import bake_transforms
from compress_core.transforms.python_state import copied
from compress_core.transforms.wrapped_forward import drop_mixed_precision

logger = logging.getLogger("compress_core.export")


def exporters() -> Mapping[str, Exporter]:
    """Returns what is installed at `export.target`, by name."""
    return {name: choice.value for name, choice in choices_of("export.target").items()}


@dataclass(frozen=True)
class ModelExport:
    """One call of `controller.export`.

    Attributes:
        model: The compressed model; it is not changed.
        lifecycle: Its algorithms.
        caller: Name of the method, for messages.
    """

    model: nn.Module
    lifecycle: Lifecycle
    caller: str

    def write(self, path: str | os.PathLike[str], args: Any, target: str, options: Options) -> ExportReport:
        """Writes the file; see `CompressionController.export`.

        Args:
            path: The file.
            args: Arguments of forward; None for an example of the creation.
            target: Name of the exporter.
            options: All other options.
        """
        context = self.lifecycle.context
        exporter = exporters()[target]
        wanted = exporter.target(target, options)
        exporter.check_installed()
        file = check_path(path)
        example = context.example(self.caller) if args is None else examples_of(args)[0]
        model = self._copy()
        inputs = inputs_of(example, model)
        inputs = with_varying_sizes(inputs, model, options.dynamic_shapes, options.input_names)
        model.cpu()
        with without_traces(self.model, parameters=False):
            references = references_of(model, inputs, is_dynamic=options.dynamic_batch)
            rewrites = tuple(self.lifecycle.export(model, wanted))
            bake_transforms(model)
            job = ExportJob(
                model,
                file,
                references,
                self._copies,
                rewrites,
                algorithms=tuple(algorithm.name for algorithm in self.lifecycle.algorithms),
                target_device=context.config.root.target_device,
                options=options,
            )
            with export_errors(file):
                report = exporter.export(job)
        less = unfinished(self.model, self.lifecycle)
        for note in [*report.notes, *([f"{less}."] if less else [])]:
            logger.warning("%s %s", report.path, note)
        return report

    def _copies(self) -> Copies:
        copies = Copies(self._copy().cpu(), self._copy().cpu())
        self.lifecycle.strip_unexported(copies.stripped)
        return copies

    def _copy(self) -> nn.Module:
        model = copied(self.model).eval()
        drop_mixed_precision(model)
        remove_recorders(model)
        return model
