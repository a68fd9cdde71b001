"""Interfaces of the services that the context offers to algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import nn

T = TypeVar("T")


class BatchNormService(Protocol):
    """Adapts the running statistics of one model; algorithms use it as `context.batch_norm`."""

    def adapted(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Returns a context manager that adapts the statistics on exit, if `enabled`.

        Change transforms inside it, in methods such as `set_sparsity_level(..., run_batchnorm_adaptation=True)`. The
        present statistics are taken to belong to the model as it is on entry.

        Raises:
            DataError: On entry: there are no batches to adapt with.
        """

    def as_it_will_be(self) -> AbstractContextManager[None]:
        """Returns a context manager in which batch norm has the statistics that the coming adaptation will set.

        For `compress_calibrate` of algorithms that measure activations. If the config does not ask for adaptation, or
        it is not installed, batch norm stays unchanged.
        """


class TransactionService(Protocol):
    """Runs what changes a model, all or nothing; used by methods that are marked with `all_or_nothing`."""

    def run(
        self, function: Callable[[], T], others: Iterable[object] = (), *, call: str = "", local: bool = False
    ) -> T:
        """Returns what the function returns; if it fails, or is interrupted, everything is put back.

        Args:
            function: Called without arguments.
            others: Whatever else may change: models, optimizers, and what else has a `load_state_dict` is put back too.
            call: What is called, for messages; the same in all processes of a training.
            local: Whether one of several processes may call it without the others.
        """


class Directly:
    """Runs functions as they are: `create_compressed_model` as a whole is all or nothing itself."""

    def run(
        self, function: Callable[[], T], others: Iterable[object] = (), *, call: str = "", local: bool = False
    ) -> T:
        """Returns what the function returns."""
        return function()


class UncompressedService(Protocol):
    """Provides the model as it was before the first commit: `context.uncompressed()` and `context.teacher`."""

    def view(self) -> AbstractContextManager[nn.Module]:
        """Returns a context manager that gives the uncompressed model, during creation."""

    def teacher(self) -> nn.Module:
        """Returns the frozen copy that stays available in training."""
