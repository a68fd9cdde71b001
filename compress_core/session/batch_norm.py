"""Adapts the running statistics of the compressed model, for algorithms and the controller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from compress_core.batchnorm.adaptation import BatchNormAdaptation
from compress_core.batchnorm.report import AdaptationReport
from compress_core.data.calibration import BNAdaptationInitArgs
from compress_core.errors import UsageError
from compress_core.session.lifecycle import Lifecycle
from compress_core.transforms.model_wide import swapped_transform_buffers


class BatchNorm:
    """Implements `compress_core.contract.services.BatchNormService`.

    Args:
        model: The model.
        lifecycle: Its algorithms and initializers.
    """

    def __init__(self, model: nn.Module, lifecycle: Lifecycle) -> None:
        self._model, self._lifecycle = model, lifecycle

    @contextlib.contextmanager
    def adapted(self, enabled: bool = True) -> Iterator[None]:
        """See `BatchNormService`."""
        if not enabled:
            yield
            return
        # So that missing data is an error before anything is changed.
        self._lifecycle.context.calibration_data("run_batchnorm_adaptation=True", BNAdaptationInitArgs)
        with swapped_transform_buffers(self._model) as as_before:
            yield
            self.adapt(None, None, None, as_before)

    @contextlib.contextmanager
    def as_it_will_be(self) -> Iterator[None]:
        """See `BatchNormService`."""
        adaptation = self._adaptation
        if adaptation is None or self._lifecycle.context.resuming:
            yield
            return
        with adaptation.provisional(self._model, self._lifecycle.context):
            yield

    def adapt(self, loader: Any, num_samples: int | None, method: Any, reference: Any = None) -> AdaptationReport:
        """Adapts now; arguments that are None come from the config, see `BatchNormAdaptation.adapt`.

        Raises:
            UsageError: Batch-norm adaptation is not installed.
            DataError: There are no usable batches; the statistics are unchanged.
        """
        adaptation = self._adaptation
        if adaptation is None:
            raise UsageError("batch-norm adaptation is not installed: the plugin 'batchnorm_adaptation' was not loaded")
        adaptation.run_again(
            self._model, self._lifecycle.context, loader, num_samples=num_samples, method=method, reference=reference
        )
        assert adaptation.report is not None
        return adaptation.report

    @property
    def _adaptation(self) -> BatchNormAdaptation | None:
        found = self._lifecycle.initializers.get(BatchNormAdaptation.name)
        return found if isinstance(found, BatchNormAdaptation) else None
