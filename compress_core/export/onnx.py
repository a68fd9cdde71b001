"""Exports a prepared model to ONNX: exports the graph, applies rewrites, verifies it, and writes the whole file."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.inputs import Inputs
from compress_core.export.names import name_inputs_and_outputs
from compress_core.export.report import ExportReport
from compress_core.export.target import GraphRewrite
from compress_core.export.verification import Reference, compare, optimized_operators, runtime_name
from compress_core.torch_internals import tree_leaves
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE

logger = logging.getLogger(__name__)

METADATA_KEY = "compress_core.export"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OLDEST_OPSET = 21  # DequantizeLinear of int32, of 16 bits, and of any floating-point type
# Added to the error if the file agrees with torch without optimizations: then the integer kernels are the cause.
_SATURATION = (
    ". With the optimizations off they agree: on processors without VNNI instructions, integer kernels saturate when "
    "they add two products of 8 bits; weights on half-range grids (quantization's overflow_fix) prevent it"
)
_LARGEST_FILE = 2**31 - 1  # the limit of protobuf
_LARGEST_DUPLICATE = 16384  # elements: zero points of many channels, not weights


@dataclass(frozen=True)
class Options:
    """Options of an export; see `CompressionController.export_onnx`."""

    tolerance: float
    opset: int
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    dynamic_batch: bool
    verify: bool

    def __post_init__(self) -> None:
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or self.opset < _OLDEST_OPSET:
            raise UsageError(f"opset: {self.opset!r}: quantized models need an integer of {_OLDEST_OPSET} or more")
        if not isinstance(self.tolerance, (int, float)) or not self.tolerance >= 0:
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


def reference_outputs(model: nn.Module, inputs: Inputs) -> Reference:
    """Returns the outputs of a model in eval mode on the inputs, which the model may write to."""
    copied = inputs.resized(inputs.batch_size) if inputs.batch_size else inputs
    with torch.no_grad():
        result = model(*copied.args, **copied.kwargs)
    return Reference(inputs, tuple(leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))


def export(
    model: nn.Module,
    path: Path,
    references: Sequence[Reference],
    rewrites: Iterable[GraphRewrite],
    algorithms: Sequence[str],
    options: Options,
) -> ExportReport:
    """Writes a prepared model to a file, after verifying that the file computes the same.

    Args:
        model: The model in eval mode on the CPU, prepared by every algorithm.
        path: The file; an existing file is replaced.
        references: Batches and the outputs of the compressed model; the export uses the first batch.
        rewrites: Changes of the graph by the algorithms, in order.
        algorithms: Names of the algorithms, for the report.
        options: All other options.

    Raises:
        ExportError: The model cannot be exported, or the file differs by more than the tolerance. No file is written,
            and an existing file is not changed.
        UsageError: The names do not fit the inputs or outputs.
    """
    graph = _graph(model, references[0].inputs, options)
    _forget_the_machine(graph)
    for rewrite in rewrites:
        rewrite(graph)
    _drop_what_is_unused(graph)
    name_inputs_and_outputs(graph, options.input_names, options.output_names)
    report = ExportReport(
        opset=options.opset,
        algorithms=tuple(algorithms),
        tolerance=options.tolerance,
        inputs=tuple(str(value.name) for value in graph.graph.inputs),
        outputs=tuple(str(value.name) for value in graph.graph.outputs),
        operators=dict(sorted(Counter(node.op_type for node in graph.graph).items())),
    )
    if options.verify:
        report = _verified(report, _serialized(graph), references)
    graph.metadata_props[METADATA_KEY] = report.to_json()
    serialized = _serialized(graph)
    _write(path, serialized)
    return replace(report, path=str(path), size=len(serialized))


def _graph(model: nn.Module, inputs: Inputs, options: Options) -> Any:
    is_dynamic = options.dynamic_batch and bool(inputs.batch_size)
    with _quiet(), _no_fused_attention():
        try:
            program = _program(model, inputs, is_dynamic)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=options.opset,
                verbose=False,
                optimize=True,
            )
        except Exception as error:
            remedy = ""
            if is_dynamic:
                remedy = ". If the model is made for one batch size (a reshape with numbers), pass dynamic_batch=False"
            raise ExportError(
                f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}{remedy}"
            ) from error
    assert onnx_program is not None
    written = onnx_program.model.opset_imports.get("")
    if written != options.opset:
        raise UsageError(f"opset: this version of torch does not write {options.opset} (it wrote {written})")
    if is_dynamic:
        _name_batch(onnx_program.model, inputs)
    return onnx_program.model


def _program(model: nn.Module, inputs: Inputs, is_dynamic: bool) -> Any:
    # Not strict, because strict export loses in-place writes of functions to their arguments.
    def export(shapes: Any) -> Any:
        return torch.export.export(model, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes, strict=False)

    if not is_dynamic:
        return export(None)
    try:
        return export(_dynamic_shapes(model, inputs, torch.export.Dim("batch", min=1)))
    except RuntimeError as error:
        if "Constraints violated" not in str(error):
            raise
        # torch compared a multiple of the batch size with a number, for example to find out the memory layout of a
        # tensor. The second try allows that; the later verification shows whether other batch sizes work.
        try:
            return export(_dynamic_shapes(model, inputs, torch.export.Dim.DYNAMIC))
        except Exception:
            raise error from None  # the first error says more


def _reason(error: BaseException) -> str:
    """Returns the original error, which the exporter wraps in pages of advice for its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _dynamic_shapes(model: nn.Module, inputs: Inputs, batch: Any) -> Any:
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in inputs.tensors:
        if inputs.has_batch(tensor):
            shapes[tensor] = {0: batch}
    return shapes.dynamic_shapes(model, inputs.args, inputs.kwargs)  # type: ignore[no-untyped-call]


def _name_batch(graph: Any, inputs: Inputs) -> None:
    """Names the batch dimension, for which the exporter may have used a symbol such as s31."""
    import onnx_ir  # noqa: PLC0415 - an extra

    dims = [
        str(value.shape[0])
        for value, tensor in zip(graph.graph.inputs, inputs.tensors, strict=False)
        if inputs.has_batch(tensor) and isinstance(value.shape[0], onnx_ir.SymbolicDim)
    ]
    values = [*graph.graph.inputs, *(value for node in graph.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for position, dim in enumerate(value.shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and str(dim) in dims:
                value.shape[position] = "batch"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter logs much about its own internals that users can do nothing about.
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [log.level for log in noisy]
    for log in noisy:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, before, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def _no_fused_attention() -> Iterator[None]:
    # torch's fused attention for inference has no counterpart in ONNX.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _drop_what_is_unused(graph: Any) -> None:
    """Removes nodes that nothing reads, and duplicate initializers."""
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass  # noqa: PLC0415 - an extra

    RemoveUnusedNodesPass()(graph)
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.graph.initializers[name]
    with _quiet():
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


def _verified(report: ExportReport, serialized: bytes, references: Sequence[Reference]) -> ExportReport:
    agreements = [a for optimized in (False, True) for a in compare(serialized, references, optimized=optimized)]
    report = replace(
        report,
        runtime=runtime_name(),
        runtime_operators=optimized_operators(serialized),
        agreements=tuple(agreements),
    )
    for optimized in (False, True):
        worst = report.worst(optimized=optimized)
        if worst is not None and not worst.relative_mean <= report.tolerance:
            raise ExportError(
                f"output '{worst.output}' of {report.runtime} (graph optimizations {'on' if optimized else 'off'}) "
                f"differs from torch by {worst.relative_mean:.3g} of its mean absolute value (largest difference: "
                f"{worst.relative:.3g} of its largest value), on a batch of {worst.batch_size}; tolerance is "
                f"{report.tolerance:.3g}. No file was written. If this is expected (an untrained network, inputs "
                "unlike the calibration data), pass realistic inputs as args, or a larger tolerance"
                + (_SATURATION if optimized else "")
            )
    return report


def _write(path: Path, serialized: bytes) -> None:
    """Writes a file completely or not at all: first under another name, which is renamed when it is complete."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(serialized)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files that only their owner may read, so the usual permissions are restored.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
