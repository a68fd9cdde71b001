"""Fake-quantizers: round floating-point tensors to the values that integers of a few bits can represent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core.errors import UsageError
from compress_core.transforms import ACTIVATION_FUNCTIONS, ActivationTransform, ProjectingTransform, WeightGrid
from compress_quantization import kernels
from compress_quantization.first_values import checked, logarithm, magnitudes
from compress_quantization.grid import Grid
from compress_quantization.kernels import Source, Task, fake_quantize
from compress_quantization.kernels.formulas import StepLowHigh
from compress_quantization.kernels.sources import TINY, compute_dtype, from_ends, levels_of, raised, ranges_of_channels
from compress_quantization.participation import is_parallel, with_zero_gradients


class FakeQuantize(ProjectingTransform, ActivationTransform):
    """Base class of the fake-quantizers: rounds a tensor to a grid whose range is learned.

    Values are computed in float32 (in float64 for float64 tensors) and returned in the dtype and the memory format of
    the input. Gradients are straight-through, see `kernels.formulas`; derivatives of gradients are those of the
    straight-through surrogate, which is linear in the input and in the range.

    Attributes:
        shape: Shape of the learned range; all ones, or one dimension with the number of channels. Dimensions count
            from the end, as in broadcasting.
        bits: Number of bits.
        signed: Whether the grid has values below zero (symmetric quantizers only; an asymmetric range determines it).
        enabled: Whether it quantizes; otherwise tensors are returned unchanged.
        observer: If set, it is called with each tensor, and the tensor is returned unchanged.
    """

    recomputable = True
    fused_activations = frozenset(ACTIVATION_FUNCTIONS)
    fuses_in_place = True
    owns_input = True
    _logarithmic = ""  # name of the parameter that `logarithm_scale` is about

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int = 8,
        *,
        signed: bool = False,
        narrow_range: bool = False,
        half_range: bool = False,
        logarithm_scale: bool = False,
        smallest_scale: float = 0.0,
    ) -> None:
        """Creates a quantizer without a calibrated range.

        Args:
            shape: Shape of the learned range, e.g. `(1,)`, `(64, 1, 1, 1)`, `(1, 64, 1, 1)`.
            bits: 2 to 16.
            signed: See the class; calibration may change it.
            narrow_range: Use one level less, so that a signed grid is symmetric (symmetric quantizers only).
            half_range: Use the levels of one bit less, against overflow of 16-bit accumulators on old CPUs.
            logarithm_scale: Learn the logarithm of the scale or width; `state_dict` has the linear value, in float64,
                so that a saved and loaded quantizer is the same to the last bit.
            smallest_scale: Smallest step of the grid, for runtimes that have one: where the learned step is below it,
                the quantizer computes with this one instead, and gradients reach the learned one as if it were this.

        Raises:
            UsageError: The number of bits or the shape is invalid.
        """
        super().__init__()
        smallest = 3 if half_range else 2
        if not smallest <= bits <= 16:
            raise UsageError(f"bits: {bits} with half_range={half_range}; possible are {smallest} to 16")
        if sum(size != 1 for size in shape) > 1 or 0 in shape:
            raise UsageError(f"shape {tuple(shape)} of a quantizer: at most one dimension may differ from 1, none be 0")
        self._first_shape, self.bits, self.signed = tuple(shape), bits, signed
        self.narrow_range, self.half_range, self.logarithm_scale = narrow_range, half_range, logarithm_scale
        self.smallest_scale = smallest_scale
        self.enabled = True
        self.observer: Callable[[torch.Tensor], Any] | None = None
        channels = [dim for dim, size in enumerate(shape) if size > 1]
        self._channel_dim = channels[0] if channels else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the learned range; it follows the tensors when pruning makes them smaller."""
        learned = getattr(self, self._logarithmic, None)
        return self._first_shape if learned is None else tuple(learned.shape)

    @property
    def channel_dim(self) -> int | None:
        """Dimension of the channels in `shape`, or None if there is one grid for the whole tensor."""
        return self._channel_dim

    def levels(self) -> tuple[int, int]:
        """Returns the smallest and the largest integer of the grid."""
        raise NotImplementedError

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Sets the range from statistics.

        Args:
            minimum: Smallest values, of a shape that broadcasts to `shape`.
            maximum: Largest values.

        Raises:
            DataError: A value is not finite, or a minimum is above its maximum.
        """
        raise NotImplementedError

    def _source(self, dtype: torch.dtype) -> Source:
        """Returns the values from which the range is computed, in this dtype."""
        source = self._learned_source(dtype)
        if not self.smallest_scale:
            return source
        return Source("given", raised(ranges_of_channels(source, self.levels(), dtype), self.smallest_scale))

    def _learned_source(self, dtype: torch.dtype) -> Source:
        """Does the same without regard to the smallest scale."""
        raise NotImplementedError

    @torch.no_grad()
    def step_low_high(self, dtype: torch.dtype = torch.float32) -> StepLowHigh:
        """Returns `step`, `low` and `high` of `kernels.formulas`, detached, each of shape (channels,)."""
        return ranges_of_channels(self._source(dtype), self.levels(), dtype)

    def _learned(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the parameters that get the gradients of the range's width and of its low end."""
        raise NotImplementedError

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the smallest and the largest value of the grid, detached, in the shape of the range."""
        grid = self.grid()
        low, high = (grid.scale * (level - grid.zero_point) for level in (grid.quant_min, grid.quant_max))
        return low.reshape(self.shape), high.reshape(self.shape)

    def grid(self) -> Grid:
        """Returns the grid for runtimes; 8-bit integers fit int8 (signed) or uint8 (unsigned, asymmetric)."""
        step, low, _ = self.step_low_high()
        smallest, largest = self.levels()
        shape = () if self._channel_dim is None else (-1,)
        zero_point = (smallest - torch.round(low / step)).to(torch.int32)
        return Grid(step.reshape(shape), zero_point.reshape(shape), smallest, largest, self._channel_dim)

    def allowed_values(self, weight: torch.Tensor) -> WeightGrid | None:
        """Returns the grid, or None while the quantizer is off."""
        if not self.is_active(weight):
            return None
        g = self.grid()
        scale, zero_point = g.scale.reshape(self.shape), g.zero_point.reshape(self.shape)
        return WeightGrid(scale, zero_point, g.quant_min, g.quant_max, adjustable=True)

    def set_scale(self, scale: torch.Tensor) -> None:
        """Sets the step of the grid, a tensor in the shape of the range; the zero point stays."""
        self._raise_scale()
        self._multiply(scale.double() / self.grid().scale.reshape(self.shape).double())

    @torch.no_grad()
    def _multiply(self, factor: torch.Tensor) -> None:
        """Multiplies the range by a factor, float64, in the shape of the range."""
        for name, parameter in self.named_parameters(recurse=False):
            values, is_logarithm = parameter.double(), self.logarithm_scale and name == self._logarithmic
            self._store(parameter, values + factor.log() if is_logarithm else values * factor)

    @torch.no_grad()
    def _raise_scale(self) -> None:
        """Raises what is learned to the smallest scale, so that it moves on from there and not from below."""
        if not self.smallest_scale:
            return
        step, _, _ = ranges_of_channels(self._learned_source(torch.float32), self.levels(), torch.float32)
        self._multiply((self.smallest_scale / step.double()).clamp_min(1).reshape(self.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` on the grid.

        Args:
            x: Tensor to which `shape` broadcasts; a tensor that is not floating point is returned unchanged.

        Raises:
            UsageError: `x` does not have the number of channels of the quantizer.
        """
        if self.is_active(x):
            return self._quantize(x, None)
        if self.observer is not None:
            self.observer(x)
        return with_zero_gradients(x, self) if is_parallel() and x.is_floating_point() else x

    def forward_owned(self, x: torch.Tensor) -> torch.Tensor:
        """Does what `forward` does, but may overwrite `x`, which has no other reader."""
        if self.is_active(x):
            return self._quantize(x, None, owned=True)
        result: torch.Tensor = self.forward(x)
        return result

    def fused(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Returns `self(function(x))` in one pass.

        Args:
            x: What the activation function takes.
            activation: Its name, of `compress_core.transforms.ACTIVATION_FUNCTIONS`.
        """
        if self.is_active(x):
            return self._quantize(x, activation)
        result: torch.Tensor = self.forward(ACTIVATION_FUNCTIONS[activation](x))
        return result

    def fused_in_place(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Returns `self(function(x, inplace=True))`; writes the activated value or this result to `x`.

        Args:
            x: What the activation function takes.
            activation: Its name, of `compress_core.transforms.ACTIVATION_FUNCTIONS`.
        """
        if self.is_active(x) and kernels.can_replace(x, activation):
            return self._quantize(x, activation, owned=True)
        result: torch.Tensor = self.forward(ACTIVATION_FUNCTIONS[activation](x, inplace=True))
        return result

    def is_active(self, x: torch.Tensor) -> bool:
        """Returns whether `forward` would quantize a tensor."""
        return self.observer is None and self.enabled and x.is_floating_point()

    def _quantize(self, x: torch.Tensor, activation: str | None, *, owned: bool = False) -> torch.Tensor:
        dim = self._channel_dim
        if dim is not None:
            dim += x.ndim - len(self.shape)
            if dim < 0 or x.shape[dim] != self.shape[self._channel_dim or 0]:
                raise UsageError(
                    f"a quantizer for channels, of shape {self.shape}, got a tensor of shape {tuple(x.shape)}; "
                    "it was made for another layer or another layout"
                )
        learned, offset = self._learned()
        source = self._source(compute_dtype(x.dtype))
        task = Task(dim, self.levels(), offset is not None, activation, self.lr_multiplier)
        return fake_quantize(x, learned, offset, source, task, owned=owned)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.logarithm_scale:
            destination[prefix + self._logarithmic] = destination[prefix + self._logarithmic].double().exp()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + self._logarithmic
        if self.logarithm_scale and key in state_dict:
            state_dict = {**state_dict, key: logarithm(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _initial(self, value: float) -> nn.Parameter:
        return nn.Parameter(torch.full(self.shape, value))

    def _store(self, parameter: nn.Parameter, values: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(values)

    def _width(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns a scale or width from its parameter: positive, with a graph in the logarithmic form only."""
        if self.logarithm_scale:
            return parameter.to(compute_dtype(parameter.dtype)).exp().clamp_min(TINY)
        return parameter

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantize:
        """Moves the range with the model, in float32 or more: half-precision types would round or overflow it."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fn(tensor)
            is_narrower = moved.dtype in {torch.float16, torch.bfloat16} and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if is_narrower else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An observer belongs to the calibration of this very object, and often cannot be pickled.
        return {**self.__dict__, "observer": None}

    def extra_repr(self) -> str:
        """Returns the settings for `repr`."""
        flags = [name for name in ("narrow_range", "half_range", "logarithm_scale") if getattr(self, name)]
        if self.smallest_scale:
            flags.append(f"smallest_scale={self.smallest_scale:g}")
        if not self.enabled:
            flags.append("disabled")
        return ", ".join([f"shape={self.shape}", f"bits={self.bits}", f"levels={self.levels()}", *flags])


class SymmetricFakeQuantize(FakeQuantize):
    """Rounds to a grid around zero, or from zero upwards; the learned scale S is the largest value of the grid.

    Levels for b bits: signed -2^(b-1)..2^(b-1)-1, unsigned 0..2^b-1. `narrow_range` removes one level (the lowest of a
    signed grid, the highest of an unsigned one), `half_range` uses b-1 bits.

    Attributes:
        scale: Parameter of shape `shape`; S = |scale|, or exp(scale) with `logarithm_scale`; at least 2^-108.
    """

    follows: ClassVar[Mapping[str, str]] = {"scale": "weight"}
    _logarithmic = "scale"

    def __init__(self, shape: tuple[int, ...], bits: int = 8, **options: Any) -> None:
        super().__init__(shape, bits, **options)
        self.scale = self._initial(0.0 if self.logarithm_scale else 1.0)

    def levels(self) -> tuple[int, int]:
        """Returns the smallest and the largest integer of the grid."""
        bits = self.bits - 1 if self.half_range else self.bits
        if self.signed:
            return -(2 ** (bits - 1)) + int(self.narrow_range), 2 ** (bits - 1) - 1
        return 0, 2**bits - 1 - int(self.narrow_range)

    def _learned_source(self, dtype: torch.dtype) -> Source:
        if not self.logarithm_scale:
            return Source("symmetric", (self.scale,))
        smallest, largest, top = levels_of(*self.levels(), dtype)
        step = self._width(self.scale.detach()).to(dtype).reshape(-1) / largest
        return Source("given", (step, step * smallest, step * top))

    def _learned(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._width(self.scale), None

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Sets the scale to max(|minimum|, |maximum|).

        A channel of zeros gets the largest scale of the others, and a tensor of zeros 0.1. Values below 2^-108 (3e-33)
        count as zero.

        Args:
            minimum: Smallest values, of a shape that broadcasts to `shape`.
            maximum: Largest values.

        Raises:
            DataError: A value is not finite or above 2^126, or a minimum is above its maximum.
        """
        low, high = checked(minimum, maximum, self.shape)
        scale, is_zero, of_zeros = magnitudes(low, high)
        scale = torch.where(is_zero, of_zeros, scale)
        self._store(self.scale, logarithm(scale) if self.logarithm_scale else scale)
        self._raise_scale()


class AsymmetricFakeQuantize(FakeQuantize):
    """Rounds to a grid with two learned ends, tuned so that zero is on the grid.

    Levels for b bits: 0..2^b-1; `half_range` uses b-1 bits, `narrow_range` has no effect. The grid is that of `Grid`,
    with an integer zero point. The ends are tuned as in NNCF: low <= 0 <= high, the zero point is rounded, and of the
    two ranges with this zero point (low moved, or high moved) the wider one is used. If an end is so close to zero that
    the zero point is the first or the last integer, NNCF's rounding is up to half a step off the nearest grid value;
    here it is always the nearest value, as in runtimes.

    Attributes:
        input_low: Parameter of shape `shape`: the low end, before tuning.
        input_range: Parameter: width = |input_range|, or exp(input_range) with `logarithm_scale`; at least
            2^-108.
    """

    follows: ClassVar[Mapping[str, str]] = {"input_low": "weight", "input_range": "weight"}
    _logarithmic = "input_range"

    def __init__(self, shape: tuple[int, ...], bits: int = 8, **options: Any) -> None:
        super().__init__(shape, bits, **options)
        self.input_low = self._initial(0.0)
        self.input_range = self._initial(0.0 if self.logarithm_scale else 1.0)

    def levels(self) -> tuple[int, int]:
        """Returns the smallest and the largest integer of the grid."""
        return 0, 2 ** (self.bits - 1 if self.half_range else self.bits) - 1

    def _learned_source(self, dtype: torch.dtype) -> Source:
        if not self.logarithm_scale:
            return Source("asymmetric", (self.input_low, self.input_range))
        low, width = self.input_low.detach().to(dtype), self._width(self.input_range.detach()).to(dtype)
        return Source("given", from_ends(low.reshape(-1), width.reshape(-1), self.levels()[1]))

    def _learned(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._width(self.input_range), self.input_low

    def set_range(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Sets the ends to `minimum` and `maximum`, or the range between zero and the value where both are one value.

        A channel of zeros gets the range from zero to the largest absolute value of the others, and a tensor of zeros
        that to 0.1. Values below 2^-108 (3e-33) count as zero.

        Args:
            minimum: Smallest values, of a shape that broadcasts to `shape`.
            maximum: Largest values.

        Raises:
            DataError: A value is not finite or above 2^126, or a minimum is above its maximum.
        """
        low, high = checked(minimum, maximum, self.shape)
        _, is_zero, of_zeros = magnitudes(low, high)
        # A width of zero would have no gradient.
        is_constant = high - low < TINY
        low, high = (
            torch.where(is_constant, end, given) for end, given in ((low.clamp_max(0), low), (high.clamp_min(0), high))
        )
        low, width = torch.where(is_zero, 0.0, low), torch.where(is_zero, of_zeros, high - low)
        self._store(self.input_low, low)
        self._store(self.input_range, logarithm(width) if self.logarithm_scale else width)
        self._raise_scale()
