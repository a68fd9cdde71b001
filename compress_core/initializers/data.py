"""Calibration data: from whatever a training script has to calls of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from compress_core.errors import DataError

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class InitArgs:
    """Data for initializers.

    Attributes:
        data_loader: An iterable of batches: tensors, tuples or lists of (inputs, target), dicts of keyword arguments.
        device: Where batches are moved; by default to where the model is.
        forward_fn: Says how a batch is given to the model, `forward_fn(model, batch)`, when that is not obvious.
    """

    data_loader: Any
    device: torch.device | str | None = None
    forward_fn: ForwardFn | None = None


class BNAdaptationInitArgs(InitArgs):
    """Data for batch-norm adaptation."""


class QuantizationRangeInitArgs(InitArgs):
    """Data for the ranges of quantizers."""


@dataclass(frozen=True)
class ModelEvaluationArgs:
    """The metric of the model.

    Attributes:
        eval_fn: Takes the model and returns a number, larger is better.
    """

    eval_fn: Callable[[nn.Module], Any]


class CalibrationData:
    """Batches for one purpose, together with how the model is called with one.

    Args:
        args: What the user registered.
        path: Path of the config section that asks for the data; it leads error messages.
    """

    def __init__(self, args: InitArgs, path: str) -> None:
        if not hasattr(args.data_loader, "__iter__"):
            raise DataError(
                f"{path}: needs an iterable of batches, such as a DataLoader, got {type(args.data_loader).__name__}"
            )
        self._args = args
        self._path = path

    @property
    def loader(self) -> Any:
        """The user's loader."""
        return self._args.data_loader

    @property
    def path(self) -> str:
        """The path of the config section that asks for the data."""
        return self._path

    def batches(self, num_samples: int) -> Iterator[tuple[Any, int]]:
        """Yields (batch, number of samples in it) until `num_samples` is reached as nearly as whole batches allow.

        At least one batch is yielded. At most one batch is fetched and not used: only its size tells whether it brings
        the count nearer, and the last batch of a loader is often smaller than the others.

        Raises:
            DataError: The loader is empty, or a batch holds no tensor.
        """
        seen = 0
        for batch in self._args.data_loader:
            size = self._size(batch)
            if seen and 2 * (num_samples - seen) < size:
                return
            yield batch, size
            seen += size
            if seen >= num_samples:
                return
        if not seen:
            raise DataError(
                f"{self._path}: the data loader gave no sample; a generator that was read before is empty, give a "
                "fresh one or a DataLoader"
            )

    def call(self, model: nn.Module, batch: Any) -> None:
        """Runs the model's forward on a batch.

        Raises:
            DataError: It is not clear how the model takes such a batch.
        """
        device = self._args.device or _device_of(model)
        batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)
        if self._args.forward_fn is not None:
            self._args.forward_fn(model, batch)
            return
        get_inputs = getattr(self._args.data_loader, "get_inputs", None)  # NNCF's PTInitializingDataLoader
        args, kwargs = get_inputs(batch) if callable(get_inputs) else self._arguments(model, batch)
        model(*args, **kwargs)

    def _size(self, batch: Any) -> int:
        for leaf in tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                return leaf.shape[0] if leaf.ndim else 1
        raise DataError(
            f"{self._path}: a batch of type {type(batch).__name__} holds no tensor; give the loader a collate function "
            "that makes tensors"
        )

    def _arguments(self, model: nn.Module, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if isinstance(batch, torch.Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            return (), _accepted(model, batch)
        if isinstance(batch, (tuple, list)) and batch:
            inputs = _inputs_of(model, batch)
            if len(inputs) == 1:
                if isinstance(inputs[0], Mapping):
                    return (), _accepted(model, inputs[0])
                if isinstance(inputs[0], (tuple, list)):
                    return tuple(inputs[0]), {}
            return tuple(inputs), {}
        raise DataError(
            f"{self._path}: cannot tell how the model takes a batch of type {type(batch).__name__}; give "
            "forward_fn=lambda model, batch: model(...)"
        )


def _inputs_of(model: nn.Module, batch: Sequence[Any]) -> Sequence[Any]:
    """Splits off the target: (inputs, target), or as many arguments as forward needs and then targets."""
    if isinstance(batch[0], (tuple, list, Mapping)):
        return batch[:1]
    required = sum(
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for parameter in inspect.signature(model.forward).parameters.values()
    )
    return batch[: max(required, 1)]


def _accepted(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {str(key): value for key, value in batch.items()}
    return {str(key): value for key, value in batch.items() if key in parameters}


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
