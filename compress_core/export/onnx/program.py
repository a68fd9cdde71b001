"""Exports a prepared model to a graph of ONNX operators, for any batch size or for one."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.errors import ExportError, UsageError
from compress_core.export.inputs import BATCH, Inputs
from compress_core.export.onnx.operators import missing_operator
from compress_core.torch_internals import onnx_translations_kept


class FixedSizeError(ExportError):
    """torch cannot export a model for sizes that vary.

    Attributes:
        names: The sizes that are to blame, as far as is known.
    """

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


def exported_graph(model: nn.Module, inputs: Inputs, *, opset: int, is_dynamic: bool) -> tuple[Any, tuple[str, ...]]:
    """Returns the graph of a model, an `onnx_ir.Model`, and what to say about the sizes that it takes.

    Args:
        model: The model in eval mode on the CPU, which returns a tuple of tensors.
        inputs: The arguments of its forward; the sizes that they name vary.
        opset: Version of the operator set.
        is_dynamic: Whether the graph takes any batch size.

    Raises:
        FixedSizeError: A size cannot vary.
        ExportError: torch cannot export the model.
        UsageError: torch does not write this version of the operator set.
    """
    sizes = _Sizes.of(inputs, is_dynamic)
    program: torch.export.ExportedProgram | None = None
    with quiet(), _no_fused_attention(), _spelled_out(model, inputs.kwargs), onnx_translations_kept():
        try:
            program, notes = _program(model, inputs, sizes)
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
            reason = _reason(error) if program is None else missing_operator(program, error) or _reason(error)
            message = f"torch cannot export {type(model).__name__} to ONNX: {sizes.readable(reason)}"
            raise FixedSizeError(message, sizes.blamed(str(error))) from error
    assert onnx_program is not None
    written = onnx_program.model.opset_imports.get("")
    if written != opset:
        raise UsageError(f"opset: this version of torch does not write {opset} (it wrote {written})")
    _name_sizes(onnx_program.model, inputs, sizes)
    return onnx_program.model, notes


@dataclass(frozen=True)
class _Sizes:
    """Sizes that vary in an export.

    Attributes:
        places: Name -> dimensions: (number of the tensor, dimension).
    """

    places: Mapping[str, Sequence[tuple[int, int]]]

    @classmethod
    def of(cls, inputs: Inputs, is_dynamic: bool) -> _Sizes:
        found: dict[str, Sequence[tuple[int, int]]] = {entry.name: entry.places for entry in inputs.varying}
        if is_dynamic:
            known = {place for places in found.values() for place in places}
            batch = [(number, 0) for number, tensor in enumerate(inputs.tensors) if inputs.has_batch(tensor)]
            found[BATCH] = [place for place in batch if place not in known]
        return cls(found)

    def symbol(self, name: str) -> str:
        """Returns what torch is told, which takes identifiers only."""
        return name if name == BATCH else f"dimension_{list(self.places).index(name)}"

    def shapes(self, model: nn.Module, inputs: Inputs, make: Callable[[str], Any]) -> Any:
        """Returns the argument `dynamic_shapes` of torch.export."""
        by_tensor: dict[int, dict[int, Any]] = {}
        for name, places in self.places.items():
            dim = make(self.symbol(name))
            for number, place in places:
                by_tensor.setdefault(number, {})[place] = dim
        shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for number, dims in by_tensor.items():
            shapes[inputs.tensors[number]] = dims
        return shapes.dynamic_shapes(model, inputs.args, inputs.kwargs)  # type: ignore[no-untyped-call]

    def readable(self, text: str) -> str:
        """Returns a message of torch with the user's names."""
        for name in self.places:
            text = re.sub(rf"\b{self.symbol(name)}\b", lambda _, name=name: name, text)  # type: ignore[misc]
        return text

    def blamed(self, text: str) -> tuple[str, ...]:
        """Returns the names in a message of torch: those that it has found to be constants, or else all."""
        lines = text.partition("Suggested fixes")[0].splitlines()
        lines = [line for line in lines if "constant" in line] or lines[:1]
        return tuple(name for name in self.places if re.search(rf"\b{self.symbol(name)}\b", "\n".join(lines)))


def _program(model: nn.Module, inputs: Inputs, sizes: _Sizes) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    # Not strict, because strict export loses in-place writes of functions to their arguments.
    def export(shapes: Any) -> torch.export.ExportedProgram:
        return torch.export.export(model, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes, strict=False)

    if not sizes.places:
        return export(None), ()
    try:
        return export(sizes.shapes(model, inputs, lambda name: torch.export.Dim(name, min=1))), ()
    except RuntimeError as error:
        if "Constraints violated" not in str(error):
            raise
        # torch compared a multiple of the batch size with a number, for example to find out the memory layout of a
        # tensor. The second try allows that; the later verification shows whether other batch sizes work.
        try:
            program = export(sizes.shapes(model, inputs, lambda _: torch.export.Dim.DYNAMIC))
        except Exception:
            raise error from None  # the first error says more
        return program, tuple(_check_ranges(program, sizes))


def _check_ranges(program: torch.export.ExportedProgram, sizes: _Sizes) -> Iterator[str]:
    """Yields what to say about sizes for which a program is made.

    Raises:
        FixedSizeError: It computes what the model does only for small or only for large batches.
    """
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [placeholders[name].meta["val"] for name in program.graph_signature.user_inputs if name in placeholders]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    for name, places in sizes.places.items():
        symbols = {str(tensors[number].shape[dim]) for number, dim in places}
        ranges = [limits for symbol, limits in program.range_constraints.items() if str(symbol) in symbols]
        for limits in ranges[:1]:
            # torch takes no fewer than 2 for granted, which says nothing about the model.
            has_lower, has_upper = limits.lower > 2, limits.upper < sys.maxsize
            if name == BATCH and (has_lower or has_upper):
                smallest = f"fewer than {limits.lower}" if has_lower else ""
                largest = f"more than {limits.upper}" if has_upper else ""
                found = " or ".join(filter(None, (smallest, largest)))
                raise FixedSizeError(f"its forward takes another branch for {found}", (BATCH,))
            smallest = f"at least {limits.lower}" if has_lower else ""
            largest = f"at most {limits.upper}" if has_upper else ""
            if has_lower or has_upper:
                found = " and ".join(filter(None, (smallest, largest)))
                yield f"is for {name} of {found}, because the model fails or computes something else on others"


def _reason(error: BaseException) -> str:
    """Returns the original error, which the exporter wraps in pages of advice for its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].startswith("Constraints violated"):
        constant = [line for line in lines[1:] if "constant" in line]
        return (constant or lines[1:])[0].strip().removeprefix("- ").partition(". ")[0]
    found = re.search(r'raised this error:\s+File "([^"]+)", line (\d+)', str(error))
    where = f" (in {found[1].rpartition('/')[2]}, line {found[2]})" if found else ""
    return f"{type(error).__name__}: {lines[0].strip()}{where}" if lines else type(error).__name__


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


def _name_sizes(graph: Any, inputs: Inputs, sizes: _Sizes) -> None:
    """Names the dimensions that vary, for which the exporter may have used symbols such as s31."""
    import onnx_ir  # noqa: PLC0415 - an extra

    given = list(graph.graph.inputs)
    names: dict[str, str] = {}
    for name, places in sizes.places.items():
        for number, dim in places:
            size = given[number].shape[dim] if number < len(given) and given[number].shape is not None else None
            if isinstance(size, onnx_ir.SymbolicDim):
                names.setdefault(str(size), name)
    values = [*given, *(value for node in graph.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for position, dim in enumerate(value.shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and str(dim) in names:
                value.shape[position] = names[str(dim)]


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
