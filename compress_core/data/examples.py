"""Example inputs for tracing a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress_core.data.calibration import CalibrationData
from compress_core.errors import ConfigError

if TYPE_CHECKING:
    from compress_core.config.document import InputInfo


@dataclass(frozen=True)
class Example:
    """One set of inputs, and how to call the model with it.

    Attributes:
        batch: Tensors in any nesting.
        run: Calls the model with a batch.
        source: Where the inputs come from, for messages.
    """

    batch: Any
    run: Callable[[nn.Module, Any], Any]
    source: str = "the given example"

    @classmethod
    def of(cls, /, *args: Any, **kwargs: Any) -> Example:
        """Returns an example from the arguments of the model's forward."""
        return cls((args, kwargs), _called)

    @classmethod
    def from_batch(cls, data: CalibrationData, batch: Any) -> Example:
        """Returns an example from a batch of a data loader."""
        return cls(batch, data.call, "a batch of the data loader")

    @classmethod
    def from_input_info(
        cls, infos: Sequence[InputInfo], device: torch.device | None = None, source: str = "input_info"
    ) -> Example:
        """Returns an example made from `input_info` of a config.

        Args:
            infos: The entries, one for each argument of forward.
            device: Device of the tensors.
            source: Where the entries come from, for messages.

        Raises:
            ConfigError: A shape or a dtype is missing or unusable, or two entries are for the same argument.
        """
        args, kwargs = [], {}
        for index, info in enumerate(infos):
            path = f"{source}.{index}"
            tensor = _filled(info, path, device)
            if info.keyword is None:
                args.append(tensor)
            elif info.keyword in kwargs:
                raise ConfigError(f"the argument {info.keyword!r} is described twice", path=f"{path}.keyword")
            else:
                kwargs[info.keyword] = tensor
        return cls((tuple(args), kwargs), _called, source)


def _called(model: nn.Module, batch: Any) -> Any:
    # No lambda: controllers, which keep the example that they were given, can be pickled.
    return model(*batch[0], **batch[1])


def _filled(info: InputInfo, path: str, device: torch.device | None) -> torch.Tensor:
    if info.sample_size is None:
        raise ConfigError("is missing; give the full shape, batch dimension included", path=f"{path}.sample_size")
    dtype = getattr(torch, info.type, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{info.type!r} is not the name of a torch dtype, such as float or long", path=f"{path}.type")
    try:
        return _tensor(info, tuple(info.sample_size), dtype).to(device)
    except (RuntimeError, OverflowError) as error:  # a quantized dtype, or not enough memory
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"cannot make a {info.type} tensor of the shape {info.sample_size}: {reason}", path=path
        ) from error


def _tensor(info: InputInfo, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if info.filler == "random":
        # A separate generator, so that tracing does not advance the user's random numbers.
        generator = torch.Generator().manual_seed(0)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.rand(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    return torch.full(shape, 0 if info.filler == "zeros" else 1, dtype=dtype)


def examples_of(given: Any) -> list[Example]:
    """Returns a list of examples from whatever the caller gave.

    Args:
        given: An `Example`, a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these, each
            element of which becomes one example.
    """
    if isinstance(given, list):
        return [example for entry in given for example in examples_of(entry)]
    if isinstance(given, Example):
        return [given]
    if isinstance(given, Mapping):
        return [Example.of(**given)]
    if isinstance(given, tuple):
        return [Example.of(*given)]
    return [Example.of(given)]
