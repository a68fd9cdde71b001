"""Exports a prepared model to a graph of `torch.export`, and lowers it to a program for XNNPACK."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from compress_core.errors import ExportError
from compress_core.export.executorch.cleaning import drop_what_does_nothing, fold_constants
from compress_core.export.executorch.silence import quiet
from compress_core.export.inputs import Inputs
from compress_core.export.target import GraphRewrite


def graph_of(model: nn.Module, inputs: Inputs, *, largest_batch: int | None) -> fx.GraphModule:
    """Returns the graph of a model with functional ATen operators, and parameters and buffers as attributes.

    Args:
        model: The model in eval mode on the CPU, which returns a tuple of tensors.
        inputs: The arguments of its forward.
        largest_batch: The graph takes any batch size up to this one; None for the size of the inputs only.

    Raises:
        ExportError: torch cannot export the model.
    """
    try:
        with quiet(), _plain_kernels():
            shapes = _dynamic_shapes(model, inputs, largest_batch)
            # Not strict, because strict export loses in-place writes of functions to their arguments.
            program = torch.export.export(
                model, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes, strict=False
            )
            program = program.run_decompositions({})
            module = program.module(check_guards=False)
    except Exception as error:
        unsupported = inputs.unsupported()
        what = (
            f" with {', '.join(unsupported)}: arguments have to be tensors, numbers or strings" if unsupported else ""
        )
        raise ExportError(
            f"torch cannot export {type(model).__name__} for ExecuTorch{what}: {reason_of(error)}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    module.requires_grad_(False)
    drop_what_does_nothing(module)
    return module


def rewritten(module: fx.GraphModule, rewrites: Sequence[GraphRewrite]) -> None:
    """Lets the algorithms change a graph, and computes what is constant then.

    Args:
        module: The graph; changed in place.
        rewrites: The changes, in order.
    """
    for rewrite in rewrites:
        rewrite(module)
    fold_constants(module)


def lowered(
    module: fx.GraphModule,
    inputs: Inputs,
    *,
    largest_batch: int | None,
    metadata: Mapping[str, str],
    look: Callable[[Any], None] = lambda edge: None,
) -> bytes:
    """Returns the program of a graph, of which XNNPACK computes all that it can.

    Args:
        module: The graph.
        inputs: The arguments with which it was made.
        largest_batch: As for `graph_of`.
        metadata: Texts that methods of the program return: name -> text.
        look: Is called with the `EdgeProgramManager` before memory is planned.

    Raises:
        ExportError: ExecuTorch cannot lower the graph, or it restricts the batch size.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: PLC0415 - an extra
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # noqa: PLC0415

    try:
        with quiet(), _plain_kernels():
            shapes = _dynamic_shapes(module, inputs, largest_batch)
            program = torch.export.export(module, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes)
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods=dict(metadata),
                # The check compares sizes, which makes constants of them where an operator has a list of tensors.
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            _check_batch(edge.exported_program(), largest_batch)
            look(edge)
            return bytes(edge.to_executorch().buffer)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"ExecuTorch cannot lower the graph of the model: {reason_of(error)}") from error


def _check_batch(program: torch.export.ExportedProgram, largest_batch: int | None) -> None:
    """Refuses a program that takes smaller batches only: torch does not say so, and memory is planned for these."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        for size in value.shape:
            if isinstance(size, torch.SymInt) and largest_batch is not None:
                bounds = size.node.shape_env.bound_sympy(size.node.expr)
                if bounds.upper < largest_batch or bounds.lower > 2:
                    raise ExportError(
                        f"lowering restricts its batches to {bounds.lower} to {bounds.upper} samples, a decision that "
                        "an operator takes from the size"
                    )


def reason_of(error: BaseException) -> str:
    """Returns the original error in a line, without advice for the developers of the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Constraints violated"):
        return lines[1].removeprefix("- ").partition(". ")[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _dynamic_shapes(model: nn.Module, inputs: Inputs, largest_batch: int | None) -> Any:
    if largest_batch is None:
        return None
    batch = torch.export.Dim("batch", min=1, max=largest_batch)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in inputs.tensors:
        if inputs.has_batch(tensor):
            shapes[tensor] = {0: batch}
    return shapes.dynamic_shapes(model, inputs.args, inputs.kwargs)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Context manager in which torch does not choose kernels for this machine.

    To find out the memory layout of a convolution's output, torch asks which of its kernels would be used. For some of
    them that depends on the batch size, which silently restricts the program to fewer than 16 samples. And torch's
    fused attention for inference has no counterpart in ExecuTorch.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
