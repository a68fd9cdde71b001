"""What NNCF registers with a config, and how its loaders are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress_core.data.arguments import arguments_of
from compress_core.errors import DataError


class PTInitializingDataLoader:
    """A loader with `get_inputs(item) -> (args, kwargs)` and `get_target(item)`; subclass it as with NNCF.

    Args:
        data_loader: A loader of batches.
    """

    def __init__(self, data_loader: Any) -> None:
        self._data_loader = data_loader

    def __iter__(self) -> Any:
        return iter(self._data_loader)

    def __len__(self) -> int:
        return len(self._data_loader)

    @property
    def batch_size(self) -> Any:
        """The batch size of the loader within."""
        return getattr(self._data_loader, "batch_size", None)

    def __getattr__(self, name: str) -> Any:
        if name == "_data_loader":
            raise AttributeError(name)
        return getattr(self._data_loader, name)

    def get_inputs(self, dataloader_output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of forward."""
        raise NotImplementedError(f"{type(self).__name__} must implement get_inputs(item) -> (args, kwargs)")

    def get_target(self, dataloader_output: Any) -> Any:
        """Returns the target of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must implement get_target(item)")


class DefaultInitializingDataLoader(PTInitializingDataLoader):
    """A loader of (input, target): the input is one argument of forward, also if it is a tuple."""

    def get_inputs(self, dataloader_output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the first item of a pair as the only argument."""
        return (dataloader_output[0],), {}

    def get_target(self, dataloader_output: Any) -> Any:
        """Returns the second item of a pair."""
        return dataloader_output[1]


def nncf_forward(loader: Any) -> Callable[[nn.Module, Any], Any]:
    """Returns how NNCF calls a model with the batches of a loader.

    `get_inputs` of the loader decides; without one, the first item of a pair is the only argument, also if it is a
    tuple or a dict. Batches of another form, which NNCF refuses, are taken as everywhere else in compress-core.
    """
    get_inputs = getattr(loader, "get_inputs", None)

    def forward(model: nn.Module, batch: Any) -> Any:
        if callable(get_inputs):
            args, kwargs = get_inputs(batch)
            return model(*args, **kwargs)
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and not hasattr(batch, "_fields"):
            return model(batch[0])
        arguments = arguments_of(model, batch)
        if arguments is None:
            raise DataError(
                f"a batch of type {type(batch).__name__} is no pair (input, target); give a loader with "
                "get_inputs(item) -> (args, kwargs): a subclass of PTInitializingDataLoader"
            )
        return model(*arguments[0], **arguments[1])

    return forward


@dataclass(frozen=True)
class QuantizationPrecisionInitArgs:
    """What mixed precision with a Hessian needs."""

    criterion_fn: Any
    criterion: Any
    data_loader: Any
    device: Any = None


@dataclass(frozen=True)
class AutoQPrecisionInitArgs:
    """What mixed precision with an evaluation needs."""

    data_loader: Any
    eval_fn: Any
    nncf_config: Any


@dataclass(frozen=True)
class DistributedCallbacksArgs:
    """Functions that wrap a model for several GPUs, and unwrap it; nothing here wraps a model."""

    wrapping_callback: Any
    unwrapping_callback: Any


@dataclass(frozen=True)
class ExecutionParameters:
    """The device of the initialization; here batches are moved to where the model is."""

    cpu_only: bool
    current_gpu: int | None
