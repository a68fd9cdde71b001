"""Fake-quantization of one tensor: its place in autograd."""

from __future__ import annotations

from typing import Any

import torch

from compress_core.torch_internals import is_plain_execution, is_view
from compress_quantization.kernels import dispatch, formulas, traceable
from compress_quantization.kernels.formulas import StepLowHigh
from compress_quantization.kernels.layout import Layout, layout_of
from compress_quantization.kernels.sources import Source, compute_dtype, ranges_of_channels
from compress_quantization.kernels.task import Task


def fake_quantize(
    x: torch.Tensor,
    learned: torch.Tensor,
    offset: torch.Tensor | None,
    source: Source,
    task: Task,
    *,
    owned: bool = False,
) -> torch.Tensor:
    """Returns `x` on the grid; its dtype and memory format.

    Args:
        x: Floating-point tensor.
        learned: The parameter that gets `drange` times its own sign as its gradient.
        offset: The parameter that gets `dlow`; None when the range has no low end of its own (symmetric).
        source: What the range is computed from, without a graph.
        task: What is done, and how the range is learned.
        owned: Whether `x` may become the result: nobody else has it, or others want it. Without a graph it does, with
            one only where an activation function comes first (see `can_replace`).
    """
    if torch.compiler.is_compiling() or not _is_ordinary(x):
        ranges = _aligned(ranges_of_channels(source, task.levels, compute_dtype(x.dtype)), x.ndim, task)
        return traceable.fake_quantize(x, learned, offset, ranges, task)
    layout = layout_of(tuple(x.shape), x.stride(), task.channel_dim)
    if layout is None:
        x = x.clone()  # dense, in the order that x has: gradients of attention come in that of its inputs
        owned = True
        layout = layout_of(tuple(x.shape), x.stride(), task.channel_dim)
        assert layout is not None
    needs_graph = x.requires_grad or learned.requires_grad or (offset is not None and offset.requires_grad)
    if needs_graph and torch.is_grad_enabled():
        replaces = owned and task.activation is not None
        result: torch.Tensor = _FakeQuantize.apply(x, learned, offset, source, task, layout, replaces)  # type: ignore[no-untyped-call]
        return result
    with torch.no_grad():
        return dispatch.quantize(x, source, task, layout, in_place=owned)[0]


def can_replace(x: torch.Tensor, activation: str) -> bool:
    """Tells whether a tensor can become what a quantizer behind an activation function makes of it, in one pass.

    Args:
        x: The tensor.
        activation: The function; smooth ones need x for their gradients.
    """
    if not formulas.is_clip(activation):
        return False
    if torch.compiler.is_compiling() or not _is_ordinary(x) or x.dim() == 0:
        return False
    if layout_of(tuple(x.shape), x.stride(), None) is None:
        return False
    if not torch.is_grad_enabled():
        return True
    # A view shares its memory with others, and torch refuses leaves.
    return not is_view(x) and not (x.is_leaf and x.requires_grad) and not x.is_inference()


def _aligned(ranges: StepLowHigh, ndim: int, task: Task) -> StepLowHigh:
    """Returns `ranges` so that they broadcast against a tensor of `ndim` dimensions, and not it against them."""
    shape = [1] * ndim if task.channel_dim is not None else []
    if task.channel_dim is not None:
        shape[task.channel_dim] = -1
    step, low, high = (values.reshape(shape) for values in ranges)
    return step, low, high


def _is_ordinary(x: torch.Tensor) -> bool:
    return (
        type(x) in {torch.Tensor, torch.nn.Parameter}
        and x.numel() > 0
        and x.device.type in {"cpu", "cuda"}
        and x.layout == torch.strided
        and is_plain_execution()
    )


class _FakeQuantize(torch.autograd.Function):
    """Straight-through gradients from a code of one byte, or from x where keeping x is cheap."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        learned: torch.Tensor,
        offset: torch.Tensor | None,
        source: Source,
        task: Task,
        layout: Layout,
        replaces: bool,
    ) -> torch.Tensor:
        out, kept, ranges = _computed(x.detach() if replaces else x, source, task, layout)
        if replaces:
            # x gets the memory of the result, while its own may be kept for the gradients.
            out = x.set_(out)  # type: ignore[call-overload]
            ctx.mark_dirty(x)
        elif kept is x and (task.activation == "relu" or x.is_inference()):
            # Others may write to x: torch's ReLU keeps its result. And tensors of inference mode cannot be kept.
            kept = x.clone()
        ctx.task, ctx.layout = task, layout
        ctx.save_for_backward(kept, ranges, learned.detach())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, ranges, learned = ctx.saved_tensors
        task: Task = ctx.task
        # Embeddings may have sparse gradients, and optimizers for these take no others.
        rows = grad.coalesce() if grad.layout == torch.sparse_coo else None
        grad = grad if rows is None else rows.to_dense()
        compute = _gradients_with_graph if torch.is_grad_enabled() else dispatch.gradients
        grad_x, totals = compute(grad, kept, ranges, learned, task, ctx.layout)
        results: list[torch.Tensor | None] = [None, None]
        for index, total in enumerate(totals):
            if ctx.needs_input_grad[1 + index]:
                value = total if total.shape == learned.shape else total.reshape(learned.shape)
                results[index] = value if task.multiplier == 1 else value * task.multiplier
        grad_x = grad_x if rows is None else grad_x.sparse_mask(rows)
        return grad_x if ctx.needs_input_grad[0] else None, *results, None, None, None, None


def _computed(
    x: torch.Tensor, source: Source, task: Task, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, what to keep for gradients (x or codes), and the ranges."""
    # Weights are kept anyway, and small tensors cost little: they need no code. Smooth functions need x themselves.
    is_kept = layout.kind == "rows" or dispatch.is_small(layout)
    if task.activation in formulas.SMOOTH or (task.activation is None and is_kept):
        out, ranges = dispatch.quantize(x, source, task, layout)
        return out, x, ranges
    return dispatch.quantize_and_encode(x, source, task, layout)


def _gradients_with_graph(
    grad: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, learned: torch.Tensor, task: Task, layout: Layout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Does what `dispatch.gradients` does in operators that autograd follows, for derivatives of the gradients.

    The straight-through surrogate is linear in the range and in what is quantized: what the gradients depend on is
    `grad` alone, and x where a smooth activation function has a gradient that does.
    """
    step, low, high = ranges.unbind()
    x, kept, of_elements = kept, kept.detach(), _aligned((step, low, high), grad.ndim, task)
    is_smooth = task.activation in formulas.SMOOTH
    if kept.is_floating_point() and (task.activation is None or is_smooth):
        value = formulas.activate(kept.to(step.dtype), task.activation)
        derivatives = formulas.derivatives_from_input(value, of_elements, task.factors, task.offset)
    else:
        if kept.is_floating_point():
            code = formulas.encoded(kept, of_elements, task.activation)[1]
        else:
            code = dispatch.code_of_elements(kept, layout)
        derivatives = formulas.derivatives_from_code(code, of_elements, task.factors, task.activation, task.offset)
    inside, of_range = derivatives
    wide = grad.to(inside.dtype)
    dims = [dim for dim in range(grad.ndim) if dim != task.channel_dim]
    drange, *dlow = [(wide * derivative).sum(dims) for derivative in of_range]
    grad_x = torch.where(inside != 0, grad, 0.0)
    if is_smooth and x.requires_grad:
        # By autograd: not all backward operators of activation functions have a derivative.
        (grad_x,) = torch.autograd.grad(formulas.activate(x, task.activation), x, grad_x, create_graph=True)
    return grad_x, [drange * learned.reshape(-1).sign(), *dlow]
