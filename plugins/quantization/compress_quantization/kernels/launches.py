"""How kernels are called: which one, in what views of the tensors, with which constants.

Computed once for each layout and kept with it. Buys 4 to 7 % of an eval forward of the small ViT on one image (91
calls, 8 microseconds each) and 1 % of training steps of 32; the simple way would be to compute it at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from compress_core.torch_internals import TorchFunctionDisabled
from compress_quantization.kernels import compiled, lanes
from compress_quantization.kernels.compiled import Example, Kernel
from compress_quantization.kernels.lanes import Variant
from compress_quantization.kernels.layout import LANES, Layout
from compress_quantization.kernels.sources import Source, compute_dtype, levels_of
from compress_quantization.kernels.task import Task

# Sizes that kernels are traced with: of `Layout.view_shape`, and of `Layout.lane_shape` without the lanes. They stand
# for any, and tell the compiler what is long enough for threads, while sums stay below the 4096 elements from which it
# would make them in a more precise and far slower way.
_VIEWS = {
    "flat": (1_000_000,),
    "rows": (520, 1000),
    "planes": (30, 136, 1000),
    "columns": (868, 1000),
}
_ROWS = {
    "flat": (1022, 1000),
    "rows": (130, 1000),
    "planes": (30, 34, 1000),
    "columns": (62, 14, 1000),
}
_BYTES = {1: torch.int8, LANES: torch.int32}


class Launch(NamedTuple):
    """How one kernel is called.

    Attributes:
        kernel: What is called.
        shape: View of x or dy that it takes.
        of_channels: Shape in which it takes what belongs to channels.
        constants: The levels, or the factors of gradients.
        kept_shape: View of what was kept for gradients.
    """

    kernel: Kernel
    shape: tuple[int, ...]
    of_channels: tuple[int, ...]
    constants: torch.Tensor
    kept_shape: tuple[int, ...] = ()


def quantize_launch(x: torch.Tensor, source: Source, task: Task, layout: Layout, *, in_place: bool) -> Launch | None:
    """Returns how `lanes.quantize` or `lanes.quantize_in_place` is called; None where nothing can be compiled."""
    given = source.tensors[0].dtype

    def make() -> Launch | None:
        dtype = compute_dtype(x.dtype)
        variant = Variant(layout.kind, dtype, task.activation, source.kind)
        channels = _example_channels(layout.kind)
        kernel = compiled.find(
            (x.device, "quantize", in_place, x.dtype, given, variant),
            partial(lanes.quantize_in_place if in_place else lanes.quantize, variant=variant),
            lambda: [(_VIEWS[layout.kind], x.dtype), *_example_source(source, channels, dtype)],
        )
        return kernel and Launch(kernel, layout.view_shape, (layout.channels,), _levels(task, dtype, x.device))

    return _kept(layout, ("quantize", in_place, x.device, x.dtype, given, source.kind, task), make)


def encode_launch(x: torch.Tensor, source: Source, task: Task, layout: Layout) -> Launch | None:
    """Returns how `lanes.quantize_and_encode` is called; None where nothing can be compiled."""
    given = source.tensors[0].dtype

    def make() -> Launch | None:
        dtype = compute_dtype(x.dtype)
        # Compilers for GPUs load bytes as well as anything.
        count = layout.lanes if x.device.type == "cpu" else 1
        variant = Variant(layout.kind, dtype, task.activation, source.kind)
        channels = _example_channels(layout.kind, count)
        kernel = compiled.find(
            (x.device, "encode", count, x.dtype, given, variant),
            partial(lanes.quantize_and_encode, variant=variant),
            lambda: [(_example(layout.kind, count), x.dtype), *_example_source(source, channels, dtype)],
        )
        of_channels, constants = _of_channels(layout, count), _levels(task, dtype, x.device)
        return kernel and Launch(kernel, layout.lane_shape(count), of_channels, constants)

    return _kept(layout, ("encode", x.device, x.dtype, given, source.kind, task), make)


def gradients_launch(
    grad: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, learned: torch.Tensor, task: Task, layout: Layout
) -> Launch | None:
    """Returns how `lanes.gradients_from_code` or `_from_input` is called; None where nothing can be compiled.

    Args:
        grad: dy.
        kept: x, or codes.
        ranges: What came with them.
        learned: The parameter.
        task: What was done.
        layout: Layout of x.
    """

    def make() -> Launch | None:
        is_code = not kept.is_floating_point()
        # The gradients of a plain ReLU are a matter of factors.
        activation = None if task.activation == "relu" else task.activation
        variant = Variant(layout.kind, ranges.dtype, activation, offset=task.offset)
        count = LANES if kept.dtype == torch.int32 else 1
        kernel = compiled.find(
            (grad.device, is_code, count, grad.dtype, learned.dtype, variant),
            partial(lanes.gradients_from_code if is_code else lanes.gradients_from_input, variant=variant),
            lambda: _example_gradients(variant, count, (grad.dtype, learned.dtype), is_code=is_code),
        )
        shape = layout.lane_shape(count)
        kept_shape = (*shape[:-2], shape[-1]) if is_code else shape
        constants = _constants(task.factors, ranges.dtype, grad.device)
        return kernel and Launch(kernel, shape, _of_channels(layout, count), constants, kept_shape)

    key = ("gradients", grad.device, grad.dtype, kept.dtype, ranges.dtype, learned.dtype, task)
    return _kept(layout, key, make)


def _kept(layout: Layout, key: tuple[object, ...], make: Callable[[], Launch | None]) -> Launch | None:
    key = (*key, torch.get_num_threads())
    launch: Launch | None = layout.launches.get(key)
    if launch is None:
        launch = make()
        if launch is not None:
            layout.launches[key] = launch
    return launch


def _levels(task: Task, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _constants(levels_of(*task.levels, dtype), dtype, device)


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # An ordinary tensor, whatever mode the first call is made in.
    with torch.inference_mode(False), TorchFunctionDisabled():
        return torch.tensor(values, dtype=dtype, device=device)


def _of_channels(layout: Layout, count: int) -> tuple[int, ...]:
    """Returns the shape in which kernels of this many lanes take what belongs to channels."""
    return (layout.channels // count, count) if layout.kind in {"rows", "planes"} else (layout.channels,)


def _example_channels(kind: str, count: int | None = None) -> tuple[int, ...]:
    """Returns what `_of_channels` does, for the examples; without lanes, for `Layout.view_shape`."""
    if kind == "flat":
        return (1,)
    if kind == "columns":
        return (_VIEWS[kind][1],)
    return (_VIEWS[kind][-2],) if count is None else (_ROWS[kind][-2], count)


def _example(kind: str, count: int) -> tuple[int, ...]:
    *outer, row = _ROWS[kind]
    return (*outer, count, row)


def _example_source(source: Source, channels: tuple[int, ...], dtype: torch.dtype) -> list[Example]:
    return [((3,), dtype), *[(channels, tensor.dtype) for tensor in source.tensors]]


def _example_gradients(
    variant: Variant, count: int, dtypes: tuple[torch.dtype, torch.dtype], *, is_code: bool
) -> list[Example]:
    shape, channels = _example(variant.kind, count), _example_channels(variant.kind, count)
    kept: Example = (_ROWS[variant.kind], _BYTES[count]) if is_code else (shape, dtypes[0])
    others: list[Example] = [((3, *channels), variant.dtype), ((3,), variant.dtype), (channels, dtypes[1])]
    return [(shape, dtypes[0]), kept, *others]
