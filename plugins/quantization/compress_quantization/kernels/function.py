"""Fake-quantization of one tensor: which kernel, and its place in autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext

from compress_quantization.kernels import compiled, eager, formulas, traceable
from compress_quantization.kernels.formulas import Activation, Ranges
from compress_quantization.kernels.layout import Layout, layout_of

SMALL = 8192
"""Up to this many elements the eager kernel wins: calling a compiled one costs about 20 us, eager operators 1 each."""

NARROW = 32
"""Up to so many elements behind a channel, they are taken as channels of their own."""


class Task(NamedTuple):
    """What to do to a tensor, apart from the values of the range.

    Attributes:
        channel_dim: Dimension of the channels; None for one grid for the whole tensor.
        activation: Activation function that is applied before: None, "relu" or "relu6".
        multiplier: Factor on the gradients of the range.
    """

    channel_dim: int | None
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
        ranges: `step`, `low`, `high` computed from them, without a graph; the shape of `learned`.
        task: The rest.
    """
    if torch.compiler.is_compiling() or not _is_ordinary(x):
        return traceable.fake_quantize(
            x, learned, offset, _aligned(ranges, x.ndim, task), task.activation, task.multiplier
        )
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
        return _quantize(x, ranges, task, layout)


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


def _may_compile(layout: Layout) -> bool:
    if layout.numel <= SMALL or not compiled.is_available():
        return False
    # Other function modes than that of a default device would see, or be traced into, the kernel.
    return all(
        isinstance(torch._C._get_function_stack_at(index), DeviceContext)
        for index in range(torch._C._len_torch_function_stack())
    )


def _key(x: torch.Tensor, layout: Layout, *rest: Any) -> tuple[Any, ...]:
    modes = torch._C._len_torch_function_stack(), torch.is_autocast_enabled(x.device.type)
    return (layout.kind, x.dtype, x.device.type, modes, *rest)


def _compiled(
    function: compiled.Kernel, tensors: tuple[torch.Tensor, ...], ranges: Ranges, layout: Layout, *options: Any
) -> tuple[bool, Any]:
    """Runs a compiled kernel if that is possible and pays; see `compiled.run`."""
    if not _may_compile(layout):
        return False, None
    if layout.kind == "planes" and layout.inner <= NARROW:
        step, low, high = (values.repeat_interleave(layout.inner) for values in ranges)
        done, sums = _compiled(function, tensors, (step, low, high), layout.unrolled, *options)
        if sums is not None:
            sums = tuple(total.reshape(layout.channels, layout.inner).sum(1) for total in sums)
        return done, sums
    first = tensors[0]
    modes = torch._C._len_torch_function_stack(), torch.is_autocast_enabled(first.device.type)
    key = (layout.kind, first.dtype, first.device.type, modes, options)
    views = (layout.view(tensor) for tensor in tensors)
    return compiled.run(function, key, *views, *ranges, *options, layout.kind)


def _quantize(x: torch.Tensor, ranges: Ranges, task: Task, layout: Layout) -> torch.Tensor:
    out = layout.empty(x)
    if not _compiled(formulas.quantize, (x, out), ranges, layout, task.activation)[0]:
        eager.quantize(x, out, ranges, task.activation, layout)
    return out


def _quantize_and_encode(
    x: torch.Tensor, ranges: Ranges, task: Task, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    out = layout.empty(x)
    code = torch.empty_strided(layout.shape, layout.strides, dtype=torch.int8, device=x.device)
    if not _compiled(formulas.quantize_and_encode, (x, out, code), ranges, layout, task.activation)[0]:
        eager.quantize_and_encode(x, out, code, ranges, task.activation, layout)
    return out, code


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
        ctx.keeps_input = task.activation is None and (layout.kind == "rows" or layout.numel <= SMALL)
        ctx.task, ctx.layout, ctx.has_offset = task, layout, offset is not None
        if ctx.keeps_input:
            kept, out = x, _quantize(x, ranges, task, layout)
        else:
            out, kept = _quantize_and_encode(x, ranges, task, layout)
        ctx.save_for_backward(kept, *ranges, learned.detach().sign())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept, step, low, high, sign = ctx.saved_tensors
        task, layout = ctx.task, ctx.layout
        compute = _gradients_with_graph if torch.is_grad_enabled() else _gradients
        grad_x, totals = compute(grad, kept, (step, low, high), task, layout, ctx.has_offset, ctx.keeps_input)
        factors = (sign, None)
        sums: list[torch.Tensor | None] = [None, None]
        for index, total in enumerate(totals):
            if ctx.needs_input_grad[1 + index]:
                value = total.reshape(sign.shape)
                factor = factors[index]
                value = value if factor is None else value * factor
                sums[index] = value if task.multiplier == 1 else value * task.multiplier
        return grad_x if ctx.needs_input_grad[0] else None, *sums, None, None, None


def _gradients(
    grad: torch.Tensor,
    kept: torch.Tensor,
    ranges: Ranges,
    task: Task,
    layout: Layout,
    has_offset: bool,
    keeps_input: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    grad, grad_x = layout.arranged(grad), layout.empty(grad)
    tensors = grad, kept, grad_x
    if keeps_input:
        done, totals = _compiled(formulas.gradients_from_input, tensors, ranges, layout, has_offset)
        return grad_x, totals if done else eager.gradients_from_input(*tensors, ranges, has_offset, layout)
    options = task.activation, has_offset
    done, totals = _compiled(formulas.gradients_from_code, tensors, ranges, layout, *options)
    return grad_x, totals if done else eager.gradients_from_code(*tensors, ranges, *options, layout)


def _gradients_with_graph(
    grad: torch.Tensor,
    kept: torch.Tensor,
    ranges: Ranges,
    task: Task,
    layout: Layout,
    has_offset: bool,
    keeps_input: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Does what `_gradients` does in operators that autograd follows, for derivatives of the gradients.

    The straight-through surrogate is linear in x and in the range: what the gradients depend on is `grad` alone.
    """
    kept, ranges = kept.detach(), _aligned(ranges, grad.ndim, task)
    if keeps_input:
        inside, weight, outside = formulas.weighed(kept, ranges, has_offset)
    else:
        inside, weight, outside = formulas.decoded(kept, ranges, task.activation, has_offset)
    wide = grad.to(weight.dtype)
    dims = [dim for dim in range(grad.ndim) if dim != task.channel_dim]
    totals = [(wide * factor).sum(dims) for factor in ((weight, outside) if has_offset else (weight,))]
    return torch.where(inside, grad, 0.0), tuple(totals)
