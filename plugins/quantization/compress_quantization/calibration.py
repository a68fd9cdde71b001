"""Sets initial ranges from weights and calibration data, on the model that will run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from compress_core import CompressionError, DataError
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import without_traces
from compress_core.data.rng import preserved_rng
from compress_core.transforms.checkpoints import mark_filled
from compress_core.transforms.model_wide import evaluating
from compress_core.transforms.user_hooks import hook_is_running
from compress_core.transforms.weight import resolve_parameter
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.kernels.sources import TINY
from compress_quantization.plan import PlannedQuantizer
from compress_quantization.ranges import RangeStatistics

logger = logging.getLogger(__name__)


class Seeing(Protocol):
    """What is told the tensors that reach a quantizer."""

    def one_batch(self) -> AbstractContextManager[None]:
        """Returns a context manager for the tensors of one batch."""

    def update(self, tensor: torch.Tensor, /) -> None:
        """Takes a tensor into account."""


S = TypeVar("S", bound=Seeing)


@dataclass
class Observed(Generic[S]):
    """A quantizer that is being observed.

    Attributes:
        planned: Its entry in the plan.
        module: The quantizer.
        statistics: The statistics collected so far.
        samples: Number of samples to measure; with 0 the quantizer keeps its range.
    """

    planned: PlannedQuantizer
    module: FakeQuantize
    statistics: S
    samples: int


Calibrated: TypeAlias = Observed[RangeStatistics]
"""A quantizer whose range is being measured."""


def calibrate(
    model: nn.Module,
    quantizers: Collection[Calibrated],
    data: CalibrationData | None,
    *,
    batch_norm: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    strict: bool = True,
) -> list[str]:
    """Measures and sets the ranges of quantizers: first of weights, then of activations with quantized weights.

    Everything runs in eval mode without gradients; modes and random generators are restored. If anything fails, all
    quantizers are restored. With several processes, all of them use the ranges that process 0 measured.

    Args:
        model: The model.
        quantizers: The quantizers.
        data: The batches for activations; without data these keep their ranges.
        batch_norm: Returns a context manager in which batch norm has the statistics with which the model will run. It
            is entered while weights are quantized and activations are not.
        strict: Whether a quantizer that no sample reaches is an error; otherwise it is turned off with a warning.

    Returns:
        Names of the quantizers that no sample reached.

    Raises:
        DataError: The data is unusable, an activation is not finite, or no sample reaches a quantizer.
        ModelError: A weight is not finite.
    """
    chosen = [quantizer for quantizer in quantizers if quantizer.samples]
    weights = [quantizer for quantizer in chosen if quantizer.planned.group == "weights"]
    activations = [quantizer for quantizer in chosen if quantizer.planned.group == "activations"]
    gates = [quantizer for quantizer in quantizers if quantizer.planned.is_gate]
    for quantizer in weights:
        see_weight(model, quantizer)
        _set_range(quantizer)
    if data is None or not activations:
        return []
    with _observing([], silenced=[*activations, *gates]), batch_norm():
        seen = see_activations(model, activations, data)
    if 2 * seen < (wanted := max(quantizer.samples for quantizer in activations)):
        logger.warning("%s: %d samples were asked for, the data loader gave %d", data.path, wanted, seen)
    unreached = _unreached(activations, data, strict=strict)
    for quantizer in activations:
        if quantizer.planned.name not in unreached:
            _set_range(quantizer)
    return unreached


def see_weight(model: nn.Module, quantizer: Observed[S]) -> None:
    """Updates the statistics of a weight quantizer with its weight, after the transforms before the quantizer."""
    owner, name = resolve_parameter(model, quantizer.planned.parameter)
    with torch.no_grad(), _observing([quantizer]):
        getattr(owner, name)


def see_activations(model: nn.Module, quantizers: Sequence[Observed[S]], data: CalibrationData) -> int:
    """Updates the statistics of activation quantizers with batches, each until it has its number of samples.

    Returns:
        How many samples there were.
    """
    wanted = max(quantizer.samples for quantizer in quantizers)
    seen = 0
    with evaluating(model), without_traces(model), preserved_rng(data.loader):
        for batch, size in data.batches(wanted, "ranges of activations"):
            with _observing([q for q in quantizers if seen < q.samples], silenced=quantizers):
                data.call(model, batch)
            seen += size
    return seen


def _unreached(quantizers: Sequence[Calibrated], data: CalibrationData, *, strict: bool) -> list[str]:
    missed = [quantizer for quantizer in quantizers if not quantizer.statistics.has_seen_values]
    names = [quantizer.planned.name for quantizer in missed]
    if not names:
        return []
    message = (
        f"{data.path}: no calibration sample reaches {len(names)} of {len(quantizers)} quantizers of activations, such "
        f"as {names[:3]}, so their ranges cannot be determined"
    )
    if strict:
        raise DataError(
            f"{message}. Give data that takes every branch of the model, name these parts in ignored_scopes, or set "
            '"unused_values": "warn" to have these quantizers turned off'
        )
    for quantizer in missed:
        quantizer.module.enabled = False
    logger.warning("%s; they are off", message)
    return names


def _set_range(quantizer: Calibrated) -> None:
    low, high = quantizer.statistics.finalize()
    module = quantizer.module
    if quantizer.planned.spec.signed is None and quantizer.planned.spec.mode == "symmetric":
        # As in NNCF, the grid is signed if any value is below zero.
        module.signed = bool((low < 0).any())
    largest = float(torch.maximum(low.abs(), high.abs()).max())
    if 0 < largest < TINY:
        logger.warning(
            "the values of '%s' are at most %.1e, and what is below %.1e counts as zero; scale them up, or name the "
            "layer in ignored_scopes",
            quantizer.planned.name,
            largest,
            TINY,
        )
    shape = quantizer.planned.shape
    try:
        module.set_range(low.reshape(shape), high.reshape(shape))
        mark_filled([module])
    except CompressionError as error:
        error.add_note(f"while the range of the quantizer '{quantizer.planned.name}' was set")
        raise


@contextlib.contextmanager
def _observing(observed: Sequence[Observed[S]], silenced: Iterable[Observed[S]] = ()) -> Iterator[None]:
    """Context manager in which the quantizers return tensors unchanged, and those in `observed` record them.

    What one of them records is one batch: a quantizer may have several places, or be called several times.
    """
    members = {id(quantizer): quantizer for quantizer in [*observed, *silenced]}
    looking = {id(quantizer) for quantizer in observed}
    before = [(quantizer.module, quantizer.module.observer) for quantizer in members.values()]
    try:
        for key, quantizer in members.items():
            quantizer.module.observer = _seen_by(quantizer.statistics) if key in looking else _look_away
        with contextlib.ExitStack() as batches:
            for quantizer in observed:
                batches.enter_context(quantizer.statistics.one_batch())
            yield
    finally:
        for module, observer in before:
            module.observer = observer


def _seen_by(statistics: Seeing) -> Callable[[torch.Tensor], None]:
    def observe(tensor: torch.Tensor) -> None:
        # If a user's hook calls a module of the model, the data is not that of the forward.
        if not hook_is_running():
            statistics.update(tensor)

    return observe


def _look_away(tensor: torch.Tensor) -> None:
    """Ignores a tensor."""
