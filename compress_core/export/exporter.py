"""`Exporter`: writes a compressed model for a runtime; the value of a choice at `export.target`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.agreement import DisagreementError
from compress_core.export.inputs import Inputs
from compress_core.export.recording import unrounded_difference
from compress_core.export.references import References
from compress_core.export.report import ExportReport
from compress_core.export.sizes import DynamicShapes
from compress_core.export.target import ExportTarget, GraphRewrite
from compress_core.transforms.python_state import copied

_DEFAULT = "onnxruntime"
_FOR_ANY = ("ANY", "TRIAL")  # made for no runtime in particular
_STRIPPED = 1e-3  # of the mean absolute output: what a model may change by being stripped, in float64


@dataclass(frozen=True)
class Options:
    """Options of an export; see `CompressionController.export`."""

    tolerance: float | None = None
    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_batch: bool = True
    verify: bool = True
    dynamic_shapes: DynamicShapes | None = None
    external_data: bool | None = None
    by_layer: bool = False

    def __post_init__(self) -> None:
        if self.tolerance is not None and not (isinstance(self.tolerance, (int, float)) and self.tolerance >= 0):
            raise UsageError(f"tolerance: {self.tolerance!r} must be a number of at least 0")
        if self.external_data is not None and not isinstance(self.external_data, bool):
            raise UsageError(f"external_data: {self.external_data!r} must be True, False or None")


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
class ExportJob:
    """What is exported, and how.

    Attributes:
        model: The model in eval mode on the CPU, prepared by every algorithm for the target.
        path: The file; an existing file is replaced.
        references: Batches and the outputs of the compressed model.
        copies: Returns copies for finding out where a file differs.
        rewrites: Changes of the exported graph by the algorithms, in order.
        algorithms: Names of the algorithms, for the report.
        target_device: The device that the model was created for.
        options: All other options.
    """

    model: nn.Module
    path: Path
    references: References
    copies: Callable[[], Copies]
    rewrites: tuple[GraphRewrite, ...]
    algorithms: tuple[str, ...]
    target_device: str
    options: Options


class Exporter(ABC):
    """Writes a compressed model for a runtime, after running the file there and comparing it with torch.

    Attributes:
        name: Name of the runtime for messages.
        format: `ExportTarget.format`.
        suffixes: Endings of the files that it writes, the usual one first.
        devices: Values of `target_device` whose grids are made for it, the one that names this runtime last.
        packages: Packages that it needs, as they are imported.
        extra: The extra of compress-core that installs them.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def check_installed(self) -> None:
        """Checks that the packages that the export needs are installed.

        Raises:
            ExportError: A package is missing; the message says how to install it.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise ExportError(
                f"{self.name}: the export needs {', '.join(missing)}: pip install 'compress-core[{self.extra}]'"
            )

    def target(self, name: str, options: Options) -> ExportTarget:
        """Returns what algorithms are told.

        Args:
            name: Name of the choice.
            options: The options.

        Raises:
            UsageError: The format does not have one of the options, or not with this value.
        """
        if options.opset is not None:
            raise UsageError(f"opset: {options.opset!r}: only ONNX files have one; leave it out for target '{name}'")
        if options.dynamic_shapes is not None:
            raise UsageError(f"dynamic_shapes: files for target '{name}' have fixed sizes; leave it out")
        if options.external_data is not None:
            raise UsageError(f"external_data: only ONNX files have this; leave it out for target '{name}'")
        return ExportTarget(self.format, 0, name)

    def made_for_another(self, job: ExportJob) -> tuple[str, ...]:
        """Returns what to say about a model whose quantizers were placed for another runtime."""
        device = job.target_device
        if not self.devices or device in (*self.devices, *_FOR_ANY):
            return ()
        return (
            f"was created for target_device '{device}', whose quantizers have the grids and the places of that device; "
            f'for {self.name} create the model with "target_device": "{self.devices[-1]}"',
        )

    def remedy(self, job: ExportJob) -> str:
        """Returns what to do about layers that are not computed in integers."""
        device = self.devices[-1] if self.devices else job.target_device
        return f'; "target_device": "{device}" places quantizers for it' if device != job.target_device else ""

    @abstractmethod
    def export(self, job: ExportJob) -> ExportReport:
        """Writes the file, after comparing it with torch.

        Raises:
            ExportError: The model cannot be exported, or the file computes something else. No file is written, and an
                existing file is not changed.
            UsageError: An option does not fit the model.
        """


def check_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of the file to write, after checking it.

    Raises:
        UsageError: The path is a folder, or in a folder that does not exist.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"path: '{target}' must name a file in a folder that exists")
    return target


def chosen_target(exporters: Mapping[str, Exporter], name: str | None, path: Path, target_device: str) -> str:
    """Returns the name of the target to export for.

    Args:
        exporters: What is installed.
        name: What the user has chosen; by default the runtime that `target_device` names, if it writes such files,
            and else `onnxruntime`, or the first one that does.
        path: The file.
        target_device: The device that the model was created for.

    Raises:
        UsageError: There is no such target, or it writes no files with this ending.
    """
    suffix = path.suffix.lower()
    if name is not None:
        if name not in exporters:
            raise UsageError(f"target: there is no '{name}'; choose one of {', '.join(exporters)}")
        endings = exporters[name].suffixes
        if suffix not in endings:
            raise UsageError(f"path: '{path}': for target '{name}', files end in {' or '.join(endings)}")
        return name
    fitting = [key for key, exporter in exporters.items() if suffix in exporter.suffixes]
    if not fitting:
        known = dict.fromkeys(ending for key in _in_order(exporters) for ending in exporters[key].suffixes)
        raise UsageError(f"path: '{path}' does not end in {', '.join(known)}; choose the runtime with target=")
    named = [key for key in fitting if exporters[key].devices[-1:] == (target_device,)]
    suiting = [key for key in fitting if target_device in exporters[key].devices]
    return _in_order(named or suiting or fitting)[0]


def _in_order(names: Iterable[str]) -> list[str]:
    """Returns names of targets, the default first, whatever plugins have added."""
    return sorted(names, key=lambda name: (name != _DEFAULT, name))
