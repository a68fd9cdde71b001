"""Fake-quantization of one tensor: its place in autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from compress_quantization.kernels import dispatch, formulas, traceable
from compress_quantization.kernels.formulas import Activation, Ranges
from compress_quantization.kernels.layout import Layout, layout_of


class Task(NamedTuple):
    """What to do to a tensor, apart from the values of the range.

    Attributes:
        channel_dim: Dimension of the channels; None for one grid for the whole tensor.
        levels: Smallest and largest integer of the grid; counted from `low` when the range has an offset.
        activation: Activation function that is applied before: None, "relu" or "relu6".
        multiplier: Factor on the gradients of the range.
    """

    channel_dim: int | None
    levels: tuple[int, int]
    activation: Activation = None
    multiplier: float = 1.0


def fake_quantize(
    x: torch.Tensor, learned: torch.Tensor, offset: torch.Tensor | None, ranges: Ranges, task: Task
) -> torch.Tensor:
    """Returns `x` on the grid; its dtype and memory format.

    Args:
        x: Floating-point tensor.
        learned: The parameter that gets `drange` times its own sign as its gradient.
        offset: The parameter that gets `dlow`; None when the range has no low end of its own (symmetric).
        ranges: `step`, `low`, `high` computed from them, without a graph; of shape (channels,).
        task: The rest.
    """
    if torch.compiler.is_compiling() or not _is_ordinary(x):
        ranges = _aligned(ranges, x.ndim, task)
        return traceable.fake_quantize(x, learned, offset, ranges, task.levels, task.activation, task.multiplier)
    layout = layout_of(tuple(x.shape), x.stride(), task.channel_dim)
    if layout is None:
        x = x.contiguous()
        layout = layout_of(tuple(x.shape), x.stride(), task.channel_dim)
        assert layout is not None
    needs_graph = x.requires_grad or learned.requires_grad or (offset is not None and offset.requires_grad)
    if needs_graph and torch.is_grad_enabled():
        result: torch.Tensor = _FakeQuantize.apply(x, learned, offset, ranges, task, layout)  # type: ignore[no-untyped-call]
        return result
    with torch.no_grad():
        return dispatch.quantize(x, ranges, task.activation, layout)


def _aligned(ranges: Ranges, ndim: int, task: Task) -> Ranges:
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
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


class _FakeQuantize(torch.autograd.Function):
    """Straight-through gradients from a code of one byte, or from x where keeping x is cheap."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        learned: torch.Tensor,
        offset: torch.Tensor | None,
        ranges: Ranges,
        task: Task,
        layout: Layout,
    ) -> torch.Tensor:
        # Weights are kept anyway, and small tensors cost little: they need no code.
        ctx.keeps_input = task.activation is None and (layout.kind == "rows" or dispatch.is_small(layout))
        ctx.task, ctx.layout, ctx.has_offset = task, layout, offset is not None
        if ctx.keeps_input:
            kept, out = x, dispatch.quantize(x, ranges, task.activation, layout)
        else:
            out, kept = dispatch.quantize_and_encode(x, ranges, task.activation, layout)
        ctx.save_for_backward(kept, *ranges, learned.detach())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, step, low, high, learned = ctx.saved_tensors
        task, ranges = ctx.task, (step, low, high)
        if torch.is_grad_enabled():
            grad_x, totals = _gradients_with_graph(grad, kept, ranges, task, ctx.layout, ctx.has_offset)
        else:
            compute = dispatch.gradients_from_input if ctx.keeps_input else dispatch.gradients_from_code
            grad_x, sums = compute(grad, kept, ranges, ctx.layout)
            slopes = formulas.slopes(ranges, task.levels, task.activation, ctx.has_offset)
            totals = formulas.weighed(sums.unbind(), slopes, ctx.has_offset)
        results: list[torch.Tensor | None] = [None, None]
        for index, total in enumerate(totals):
            if ctx.needs_input_grad[1 + index]:
                value = total.reshape(learned.shape)
                value = value * learned.sign() if index == 0 else value
                results[index] = value if task.multiplier == 1 else value * task.multiplier
        return grad_x if ctx.needs_input_grad[0] else None, *results, None, None, None


def _gradients_with_graph(
    grad: torch.Tensor, kept: torch.Tensor, ranges: Ranges, task: Task, layout: Layout, has_offset: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Does what `backward` does in operators that autograd follows, for derivatives of the gradients.

    The straight-through surrogate is linear in x and in the range: what the gradients depend on is `grad` alone.
    """
    kept, ranges = kept.detach(), _aligned(ranges, grad.ndim, task)
    if kept.is_floating_point():
        weights = formulas.weights_of_input(kept, ranges, task.levels, has_offset)
    else:
        code = dispatch.code_of_elements(kept, layout)
        weights = formulas.weights_of_code(code, ranges, task.levels, task.activation, has_offset)
    inside, factors = weights
    wide = grad.to(inside.dtype)
    dims = [dim for dim in range(grad.ndim) if dim != task.channel_dim]
    return torch.where(inside != 0, grad, 0.0), [(wide * factor).sum(dims) for factor in factors]
