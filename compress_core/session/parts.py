"""The parts of a controller, which its groups of methods share."""

from __future__ import annotations

import math

from torch import nn

from compress_core.contract.context import Context
from compress_core.errors import UsageError
from compress_core.session.history import History
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.logbook import Logbook
from compress_core.session.replaced import TransformPlaces
from compress_core.session.scheduler import CompressionScheduler
from compress_core.session.transaction import Transaction
from compress_core.session.uncompressed import UncompressedModel


class ControllerParts:
    """What a controller is made of; `CompressionController` sets it."""

    model: nn.Module
    scheduler: CompressionScheduler
    _stripped: bool
    _lifecycle: Lifecycle
    _transaction: Transaction
    _history: History
    _logbook: Logbook
    _places: TransformPlaces | None
    _uncompressed: UncompressedModel

    @property
    def context(self) -> Context:
        """The context that the hooks of this model get."""
        return self._lifecycle.context

    @property
    def _active(self) -> Lifecycle:
        if self._stripped:
            raise UsageError(
                "the model was stripped in place and is no longer compressed; strip(do_copy=True) works on a copy"
            )
        return self._lifecycle

    @property
    def _inspected(self) -> Lifecycle:
        """The lifecycle, after a look at layers that the user may have replaced or moved."""
        lifecycle = self._active
        if self._places is not None:
            self._places.replaced()
        return lifecycle

    def _rate(self) -> float:
        """The measured share of the compressed part of the model that was removed."""
        return 1.0 - math.prod(1.0 - rate for rate in self._active.rates())
