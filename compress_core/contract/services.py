"""What the core offers to algorithms besides the model: services of the context."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn


class BatchNormService(Protocol):
    """The running statistics of one model, as `context.batch_norm`."""

    def adapted(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Returns a context in which changes of transforms are followed by an adaptation, if `enabled`.

        The model as it is on entering is what the present statistics belong to. For methods such as
        `set_sparsity_level(..., run_batchnorm_adaptation=True)`.

        Raises:
            DataError: On entering: there are no batches to adapt with.
        """

    def as_it_will_be(self) -> AbstractContextManager[None]:
        """Returns a context in which batch norm has the statistics that the coming adaptation is going to give it.

        For `compress_calibrate` of algorithms that measure activations. Where no adaptation is asked for, or none is
        installed, batch norm stays as it is.
        """


class UncompressedService(Protocol):
    """The model as it was before the first commit, as `context.uncompressed()` and `context.teacher`."""

    def view(self) -> AbstractContextManager[nn.Module]:
        """Returns a context in which there is the uncompressed model, during creation."""

    def teacher(self) -> nn.Module:
        """Returns the frozen copy that lasts through training."""
