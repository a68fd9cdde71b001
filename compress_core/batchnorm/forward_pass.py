"""One adaptation pass over a model, which changes nothing except the running statistics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from compress_core.batchnorm.estimators import METHOD, Estimator
from compress_core.batchnorm.report import AdaptationReport, LayerDrift
from compress_core.contract.choices import choice
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import without_traces
from compress_core.data.progress import progress_bar
from compress_core.data.rng import preserved_rng
from compress_core.errors import DataError, ModelError
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.interrupts import interrupts_held
from compress_core.transforms.weight import WeightTransforms

logger = logging.getLogger(__name__)

Reference = Callable[[], AbstractContextManager[Any]]


class AdaptationPass:
    """Estimates new statistics for `layers`.

    Use as a context manager: an exception inside restores all statistics.

    Args:
        model: The model.
        layers: Dotted name -> batch norm to adapt; all others are not changed.
        method: Name of the estimator.
        path: Config path of the request, for messages.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, AnyBatchNorm], method: str, path: str = "batch-norm adaptation"
    ) -> None:
        self._path = path
        self._model = model
        self._method = method
        self._estimators: Sequence[Estimator] = [choice(method, METHOD)(name, layer) for name, layer in layers.items()]
        self._started = time.perf_counter()
        self.samples = 0
        self.batches = 0

    @property
    def needs_reference(self) -> bool:
        """Returns whether the estimator needs forwards of the uncompressed model as well."""
        return any(estimator.needs_reference for estimator in self._estimators)

    def __enter__(self) -> AdaptationPass:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with interrupts_held():
                self.restore_statistics()

    def run(
        self,
        data: CalibrationData,
        batches: Iterable[tuple[Any, int]],
        *,
        reference: Reference | None = None,
        compressed: bool = True,
        total: int | None = None,
        what: str = "batch-norm adaptation",
    ) -> None:
        """Runs the model on batches.

        Args:
            data: Calls the model with a batch.
            batches: (batch, number of samples) pairs.
            reference: Returns a context manager in which the model computes as the reference model; None to skip these
                forwards.
            compressed: Whether to run the compressed model.
            total: Number of samples expected, for the progress bar.
            what: What is running, for the progress bar.
        """
        with (
            without_traces(self._model),
            _watched(self._estimators),
            _quiet(self._model, data.loader, {id(e.layer) for e in self._estimators}),
            progress_bar(what, total, unit="sample") as bar,
        ):
            for batch, size in batches:
                if reference is not None:
                    for estimator in self._estimators:
                        estimator.begin_reference(alternating=compressed)
                    with reference():
                        data.call(self._model, batch)
                if compressed:
                    for estimator in self._estimators:
                        estimator.begin_compressed()
                    data.call(self._model, batch)
                    self.samples += size
                    self.batches += 1
                bar.update(size)

    def finish(self, requested: int) -> AdaptationReport:
        """Writes the estimates to the layers and returns a report of the changes."""
        unreached = [e.name for e in self._estimators if not e.compressed.count]
        if len(unreached) == len(self._estimators):
            raise DataError(
                f"{self._path}: no batch norm was reached by the calibration batches; does forward_fn call the model?"
            )
        if unreached:
            logger.warning(
                "batch-norm adaptation: %d layers were not reached and are not changed: %s", len(unreached), unreached
            )
        for estimator in self._estimators:
            if estimator.compressed.count:
                estimator.finish(self.batches, self._path)
            else:
                estimator.restore()
        return AdaptationReport(
            self._method,
            requested,
            self.samples,
            self.batches,
            time.perf_counter() - self._started,
            tuple(_drift(estimator) for estimator in self._estimators),
        )

    def follow(self, layers: dict[str, AnyBatchNorm]) -> None:
        """Continues with the layers that now have these names, after a commit replaced some of them.

        Raises:
            ModelError: A layer is gone, or has another number of channels.
        """
        for estimator in self._estimators:
            layer = layers.get(estimator.name)
            if layer is None or layer.num_features != estimator.layer.num_features:
                raise ModelError(
                    f"the batch norm '{estimator.name}' was replaced by one that cannot be paired with it; use "
                    '"method": "exact" in batchnorm_adaptation'
                )
            estimator.layer = layer

    def restore_statistics(self) -> None:
        """Restores the old statistics of the layers while the pass is interrupted."""
        for estimator in self._estimators:
            estimator.restore()


def _drift(estimator: Estimator) -> LayerDrift:
    layer, eps = estimator.layer, estimator.layer.eps
    assert layer.running_mean is not None and layer.running_var is not None
    if layer.num_features == 0:
        return LayerDrift(estimator.name, 0, 0.0, (1.0, 1.0))
    before = estimator.var.double() + eps
    shift = (layer.running_mean.double() - estimator.mean.double()).abs() / before.sqrt()
    ratio = (layer.running_var.double() + eps) / before
    return LayerDrift(
        estimator.name, estimator.compressed.count, float(shift.max()), (float(ratio.min()), float(ratio.max()))
    )


@contextlib.contextmanager
def _watched(estimators: Iterable[Estimator]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for estimator in estimators:
            handles.extend(estimator.attach())
        yield
    finally:
        with interrupts_held():
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def _quiet(model: nn.Module, loader: Any, adapted: set[int]) -> Iterator[None]:
    """Context manager: eval mode, no gradients; restores modes, random generators and all other buffers on exit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in _foreign_buffers(model, adapted)]
    with preserved_rng(loader), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            with interrupts_held():
                for module, mode in modes:
                    module.training = mode
                for buffer, values in buffers:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


def _foreign_buffers(model: nn.Module, adapted: set[int]) -> Iterator[torch.Tensor]:
    """Yields the buffers outside the adapted layers that a forward might change."""
    helpers = {id(m) for module in model.modules() if isinstance(module, WeightTransforms) for m in module.modules()}
    for module in model.modules():
        if id(module) not in adapted and id(module) not in helpers:
            yield from (b for b in module._buffers.values() if b is not None and b.layout == torch.strided)
