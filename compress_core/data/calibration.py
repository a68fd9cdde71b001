"""Calibration data: takes the user's data loader and calls the model with its batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.data.arguments import arguments_of, samples_in
from compress_core.data.forwards import running
from compress_core.data.messages import described, remedy
from compress_core.data.progress import progress_bar
from compress_core.data.ranks import shared_batches
from compress_core.data.structures import moved
from compress_core.errors import DataError

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class InitArgs:
    """Data for initializers.

    Attributes:
        data_loader: An iterable of batches: tensors or packed sequences, tuples or lists of (inputs, target), mappings,
            named tuples, dataclasses and objects with entries that forward has names for or such as `image`, graphs
            and other objects that forward takes whole, (images, targets) of detectors.
        device: Device that batches are moved to; by default that of the model.
        forward_fn: `forward_fn(model, batch)`, for models that cannot be called with a batch directly.
    """

    data_loader: Any
    device: torch.device | str | None = None
    forward_fn: ForwardFn | None = None


class BNAdaptationInitArgs(InitArgs):
    """Data for batch-norm adaptation."""


class QuantizationRangeInitArgs(InitArgs):
    """Data for the ranges of quantizers."""


@dataclass(frozen=True)
class QuantizationPrecisionInitArgs(InitArgs):
    """Data for choosing the numbers of bits of quantizers.

    Attributes:
        criterion: The loss, `criterion(outputs, target)` -> a scalar; by default none, and no labels are needed.
        criterion_fn: `criterion_fn(outputs, target, criterion)` -> a scalar, where the criterion is called otherwise.
    """

    criterion: Any = None
    criterion_fn: Callable[[Any, Any, Any], Any] | None = None


@dataclass(frozen=True)
class AutoQPrecisionInitArgs(InitArgs):
    """The metric by which the search `autoq` compares numbers of bits.

    Attributes:
        eval_fn: `eval_fn(model, loader)` -> a number, larger is better; the loader is `data_loader`, or a part of it.
    """

    eval_fn: Callable[[nn.Module, Any], Any] | None = None


@dataclass(frozen=True)
class ModelEvaluationArgs:
    """The metric of the model.

    Attributes:
        eval_fn: Takes the model and returns a number, larger is better.
    """

    eval_fn: Callable[[nn.Module], Any]


@dataclass(frozen=True)
class TeacherArgs:
    """A model to learn from in training, other than the uncompressed model.

    Attributes:
        model: The model, with its trained weights. It is called with what the compressed model is called with.
        copy: Whether a frozen copy in eval mode is made. Otherwise the model itself is used, for teachers that are too
            large to copy; it has to be in eval mode, frozen, on the device of the compressed model, and stay so.
    """

    model: nn.Module
    copy: bool = True


@dataclass(frozen=True)
class LeGRInitArgs:
    """Functions that judge candidates of a search, such as rankings of channels; fields in NNCF's order.

    Attributes:
        train_loader: What `train_fn` gets as loader.
        train_fn: `(loader, model, optimizer, controller, steps)`: trains the model for so many steps. The controller
            has `loss()` and `scheduler` only. None if candidates are not to be trained.
        train_optimizer: Takes the parameters and returns an optimizer; None for that of the algorithm.
        val_loader: What `val_fn` gets as loader.
        val_fn: `(model, loader)`, returns accuracy (larger is better) and loss.
        nncf_config: Not used.
    """

    train_loader: Any
    train_fn: Callable[[Any, nn.Module, torch.optim.Optimizer, Any, int], Any] | None
    train_optimizer: Callable[[Any], torch.optim.Optimizer] | None
    val_loader: Any
    val_fn: Callable[[nn.Module, Any], Any]
    nncf_config: Any = None


class CalibrationData:
    """Batches for one purpose, and how to call the model with them.

    Args:
        args: The data that the user registered.
        path: Path of the config section that needs the data; error messages begin with it.
    """

    def __init__(self, args: InitArgs, path: str) -> None:
        loader = args.data_loader
        if isinstance(loader, (type, str)) or not hasattr(loader, "__iter__"):
            kind = f"the class {loader.__name__}" if isinstance(loader, type) else type(loader).__name__
            raise DataError(f"{path}: needs an iterable of batches, such as a DataLoader, got {kind}")
        if args.forward_fn is not None and not callable(args.forward_fn):
            raise DataError(f"{path}: forward_fn must be a function (model, batch), got {args.forward_fn!r}")
        if args.device is not None:
            try:
                torch.empty(0, device=args.device)
            except (RuntimeError, AssertionError, TypeError) as error:
                raise DataError(f"{path}: the device {args.device!r} cannot be used here: {error}") from error
        self._args = args
        self._path = path

    @property
    def loader(self) -> Any:
        """The user's loader."""
        return self._args.data_loader

    @property
    def path(self) -> str:
        """The path of the config section that needs the data."""
        return self._path

    def batches(self, num_samples: int, what: str | None = "") -> Iterator[tuple[Any, int]]:
        """Yields (batch, its number of samples) until the total is as close to `num_samples` as whole batches allow.

        At least one batch is yielded. At most one batch is fetched and not used, because only its size tells whether
        it brings the total closer; the last batch of a loader is often smaller than the others.

        Args:
            num_samples: Number of samples wanted.
            what: What is done with them, for the progress bar, such as "ranges of activations"; by default that the
                data is read for the config path. None shows none, where the caller shows its own.

        Raises:
            DataError: The loader is empty, or a batch contains no tensor.
        """
        found = self._sized(num_samples)
        if what is None:
            yield from found
            return
        total = num_samples if num_samples < sys.maxsize else None
        with progress_bar(what or f"reading data for {self._path}", total, unit="sample") as bar:
            for batch, size in found:
                yield batch, size
                bar.update(size)

    def _sized(self, num_samples: int) -> Iterator[tuple[Any, int]]:
        seen = 0
        for batch in self._iterate():
            size = self._size(batch)
            if seen and 2 * (num_samples - seen) < size:
                return
            if size:
                yield batch, size
            seen += size
            if seen >= num_samples:
                return
        if not seen:
            raise DataError(
                f"{self._path}: the data loader gave no sample; a generator that was read before is empty, give a "
                "fresh one or a DataLoader whose batches hold samples"
            )

    def _iterate(self) -> Iterator[Any]:
        try:
            batches = iter(self._args.data_loader)
        except TypeError as error:
            raise DataError(f"{self._path}: the data loader cannot be iterated over: {error}") from error
        yield from shared_batches(batches)

    def call(self, model: nn.Module, batch: Any) -> None:
        """Runs the model's forward on a batch; what it leaves behind in the model is restored.

        Raises:
            DataError: It is not clear how to call the model with this batch, or the call fails.
        """
        with running(model):
            self.call_copy(model, batch)

    def call_copy(self, model: nn.Module, batch: Any) -> Any:
        """Runs the forward on a batch and returns its result, for a copy of the model that is thrown away afterwards.

        What the forward leaves behind in the model stays there.

        Raises:
            DataError: It is not clear how to call the model with this batch, or the call fails.
        """
        device = self._args.device or _device_of(model)
        try:
            # A copy, because a model may write to its inputs, and a loader may return the same tensors again.
            return self._forward(model, moved(batch, device, copied=True))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not _may_be_unsuitable(error, guessed=self._args.forward_fn is None):
                raise
            if self._args.forward_fn is not None:
                raise DataError(
                    f"{self._path}: forward_fn failed on a calibration batch: {_reason(error)}. The batch: "
                    f"{described(batch)}"
                ) from error
            raise DataError(
                f"{self._path}: the model failed on a calibration batch: {_reason(error)}. {remedy(model, batch)}"
            ) from error

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        if self._args.forward_fn is not None:
            return self._args.forward_fn(model, batch)
        get_inputs = self._get_inputs
        args, kwargs = self._arguments(model, batch) if get_inputs is None else get_inputs(batch)
        return model(*args, **kwargs)

    def _size(self, batch: Any) -> int:
        size = samples_in(batch)
        if size is not None:
            return size
        if self._args.forward_fn is not None or self._get_inputs is not None:  # which make tensors of texts or arrays
            return len(batch) if isinstance(batch, (tuple, list)) else 1
        raise DataError(
            f"{self._path}: a batch of type {type(batch).__name__} holds no tensor: {described(batch)}. Give the "
            "loader a collate function that makes tensors, or a function that does: register_default_init_args(config, "
            "loader, forward_fn=lambda model, batch: model(...))"
        )

    @property
    def _get_inputs(self) -> Callable[[Any], Any] | None:
        found = getattr(self._args.data_loader, "get_inputs", None)  # NNCF's PTInitializingDataLoader
        return found if callable(found) else None

    def _arguments(self, model: nn.Module, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
        found = arguments_of(model, batch)
        if found is None:
            raise DataError(
                f"{self._path}: cannot tell how the model takes a calibration batch. {remedy(model, batch)}"
            )
        return found


def _may_be_unsuitable(error: Exception, *, guessed: bool) -> bool:
    """Returns whether an error may come from the arguments; models check those that were guessed in their own ways."""
    if isinstance(error, DataError):
        return False
    return guessed or isinstance(error, (TypeError, RuntimeError, IndexError, NotImplementedError))


def _reason(error: Exception) -> str:
    """Returns what torch, Python or the model say, with the type where the words alone are none: KeyError: 'x'."""
    words = str(error).strip().partition("\n")[0].rstrip(" .,:")  # torch lists all its signatures after the first line
    return (
        words
        if isinstance(error, (TypeError, RuntimeError, ValueError)) and words
        else f"{type(error).__name__}: {words}"
    )


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
