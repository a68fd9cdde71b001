"""Exports a prepared model to a graph of ONNX operators, for any batch size or for one."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.inputs import Inputs


def exported_graph(model: nn.Module, inputs: Inputs, *, opset: int, is_dynamic: bool) -> Any:
    """Returns the graph of a model, an `onnx_ir.Model`.

    Args:
        model: The model in eval mode on the CPU, which returns a tuple of tensors.
        inputs: The arguments of its forward.
        opset: Version of the operator set.
        is_dynamic: Whether the graph takes any batch size.

    Raises:
        ExportError: torch cannot export the model.
        UsageError: torch does not write this version of the operator set.
    """
    with quiet(), _no_fused_attention(), _spelled_out(model, inputs.kwargs):
        try:
            program = _program(model, inputs, is_dynamic)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=True,
            )
        except ExportError:
            raise
        except Exception as error:
            if unsupported := inputs.unsupported():
                raise ExportError(
                    f"torch cannot export {type(model).__name__} to ONNX with {', '.join(unsupported)}: arguments have "
                    "to be tensors, numbers or strings, in tuples, lists and dicts"
                ) from error
            raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}") from error
    assert onnx_program is not None
    written = onnx_program.model.opset_imports.get("")
    if written != opset:
        raise UsageError(f"opset: this version of torch does not write {opset} (it wrote {written})")
    if is_dynamic:
        _name_batch(onnx_program.model, inputs)
    return onnx_program.model


def _program(model: nn.Module, inputs: Inputs, is_dynamic: bool) -> torch.export.ExportedProgram:
    # Not strict, because strict export loses in-place writes of functions to their arguments.
    def export(shapes: Any) -> torch.export.ExportedProgram:
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
            program = export(_dynamic_shapes(model, inputs, torch.export.Dim.DYNAMIC))
        except Exception:
            raise error from None  # the first error says more
        _check_ranges(program)
        return program


def _check_ranges(program: torch.export.ExportedProgram) -> None:
    """Refuses a program that computes what the model does only for small or only for large batches."""
    for sizes in program.range_constraints.values():
        # torch takes no fewer than 2 for granted, which says nothing about the model.
        smallest = f"fewer than {sizes.lower}" if sizes.lower > 2 else ""
        largest = f"more than {sizes.upper}" if sizes.upper < sys.maxsize else ""
        if smallest or largest:
            raise ExportError(f"its forward takes another branch for {' or '.join(filter(None, (smallest, largest)))}")


def _reason(error: BaseException) -> str:
    """Returns the original error, which the exporter wraps in pages of advice for its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].startswith("Constraints violated"):
        return lines[1].strip().removeprefix("- ").partition(". ")[0]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextlib.contextmanager
def _spelled_out(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which a forward with `**kwargs` names those that are given.

    torch 2.13 fails with an assertion on sizes that vary among `**kwargs`.
    """
    signature = inspect.signature(model.forward)
    known = [entry for entry in signature.parameters.values() if entry.kind is not entry.VAR_KEYWORD]
    more = [name for name in kwargs if name not in {entry.name for entry in known}]
    if not more:
        yield
        return
    forward = model.forward

    def named(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    named.__signature__ = signature.replace(parameters=[*known, *extra])  # type: ignore[attr-defined]
    before = model.__dict__.get("forward")
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


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
def quiet() -> Iterator[None]:
    """Context manager that silences the exporter, which logs much about its own internals."""
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
