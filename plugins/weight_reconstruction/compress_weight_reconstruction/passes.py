"""A pass of two models over all batches at once, which stops at each layer for all batches to arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress_core.data.calibration import CalibrationData
from compress_weight_reconstruction.interception import Interceptor, Seen, WeightCall, Weights
from compress_weight_reconstruction.layers import Layer
from compress_weight_reconstruction.norms import PairedNorm, call_at_norms
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.runners import Runner, Surroundings, closing
from compress_weight_reconstruction.twins import Writes, twin_of


@dataclass(frozen=True)
class Sources:
    """What a pass runs.

    Attributes:
        compressed: The compressed model.
        reference: The uncompressed model.
        data: Calls a model with a batch.
        surroundings: What torch keeps for each thread.
        private: Names of the buffers that forwards of the compressed and of the uncompressed model write to; None if
            that is not known yet.
    """

    compressed: nn.Module
    reference: nn.Module
    data: CalibrationData
    surroundings: Surroundings
    private: tuple[frozenset[str], frozenset[str]] | None = None


class Forward:
    """The forward of one model on one batch, which pauses at products and batch norms.

    Args:
        sources: The models and how to call them.
        batch: The batch.
        wanted: Names of the weights at whose products it pauses.
        norms: Names of the batch norms at which it pauses.
        is_compressed: Whether it is the compressed model, which pauses before its products, or the uncompressed one,
            which pauses after them.
        shortcuts: Name of a weight -> number of the call that makes its shortcut, see `Sums`.
    """

    def __init__(
        self,
        sources: Sources,
        batch: Any,
        wanted: frozenset[str],
        norms: Sequence[str],
        *,
        is_compressed: bool,
        shortcuts: Mapping[str, int],
    ) -> None:
        self._sources, self._batch = sources, batch
        original = sources.compressed if is_compressed else sources.reference
        self._model = twin_of(original, None if sources.private is None else sources.private[not is_compressed])
        self.writes = Writes(self._model, original)
        self.keeps_output = True
        self._outputs: list[Any] = []
        self._interceptor = Interceptor(
            Weights(self._model), wanted, self._at_product, before=is_compressed, shortcuts=shortcuts
        )
        self._model.register_forward_hook(self._keep)
        call_at_norms(self._model, norms, self._at_norm)
        # Name of a weight -> the batch norm that takes the output of its product.
        self.follows: dict[str, str] = {}
        self.runner = Runner(self._run, sources.surroundings)

    @property
    def seen(self) -> Seen:
        """What the forward has done with weights so far."""
        return self._interceptor.seen

    @property
    def shortcuts(self) -> Mapping[str, int]:
        """Name of a weight -> number of the call that makes its shortcut, as this forward has shown it."""
        return self._interceptor.sums.shortcuts

    @property
    def through_norm(self) -> Set[str]:
        """Names of the weights whose shortcut is added behind a batch norm."""
        return self._interceptor.sums.through_norm

    @property
    def held(self) -> Mapping[str, int]:
        """Key of a stop -> the most memory that the forward has held there, in bytes."""
        return self._interceptor.held.at

    def _pause(self, key: str, value: Any) -> None:
        self._interceptor.held.measure(key)
        self.runner.pause(key, value)

    def _run(self, runner: Runner) -> Any:
        with self._interceptor:
            result = self._sources.data.call_copy(self._model, self._batch)
        outputs, self._outputs, self._batch = self._outputs, [], None
        return (outputs or result) if self.keeps_output else None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.keeps_output:
            self._outputs.append(output)

    def _at_product(self, call: WeightCall) -> None:
        self._pause(call.name, call)

    def _at_norm(self, name: str, values: torch.Tensor) -> None:
        made_by = self._interceptor.maker(values)
        if made_by:
            self.follows[made_by] = name
        self._pause(name, values)


@dataclass
class Pair:
    """The two forwards of one batch.

    Attributes:
        compressed: That of the compressed model.
        reference: That of the uncompressed model.
    """

    compressed: Forward
    reference: Forward

    def reach(self, key: str) -> Any:
        """Advances the uncompressed model to its next stop with this key; returns the value there, None at the end."""
        while (stop := self.reference.runner.advance()) is not None:
            if stop.key == key:
                value, stop.value = stop.value, None
                return value
        return None

    def finish(self) -> None:
        """Runs the uncompressed model to its end."""
        while not self.reference.runner.is_finished:
            self.reference.runner.advance()


@dataclass
class Pass:
    """Runs both models on batches.

    Attributes:
        sources: The models and how to call them.
        wanted: Names of the weights at whose products the forwards pause.
        norms: Name of a batch norm -> its estimate.
        layers: Name of a weight -> what is gathered for it.
        order: Name of a weight or batch norm -> its position in the forward; unknown ones come last.
        positions: Chooses positions.
        shortcuts: Name of a weight -> numbers of the calls that make its shortcut in the compressed and in the
            uncompressed model.
        arrived: Called when all batches have arrived at a product of a layer; it may write to the model.
        visited: The keys of all stops, in order.
    """

    sources: Sources
    wanted: frozenset[str]
    norms: Mapping[str, PairedNorm]
    positions: Positions
    layers: Mapping[str, Layer] = field(default_factory=dict)
    order: Mapping[str, int] = field(default_factory=dict)
    arrived: Callable[[Layer], None] = lambda layer: None
    shortcuts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)

    def run(self, batches: Sequence[tuple[Any, int]], finished: Callable[[Pair], None] | None = None) -> None:
        """Runs all batches to their end.

        Args:
            batches: The batches, and the position in `order` from which on each takes part; the first is 0 for one.
                Until then there is no forward of it: it catches up alone, with the weights that have been written.
            finished: Called with the finished forwards of each batch; without it, outputs are not kept.
        """
        runners: list[Runner] = []
        with closing(runners):
            pairs: list[Pair] = []
            pending = list(batches)
            next_position = 0
            while True:
                while pending and pending[0][1] <= next_position:
                    pairs.append(self._pair(pending.pop(0)[0], runners, keep_output=finished is not None))
                    self._catch_up(pairs[-1], next_position)
                waiting = [pair for pair in pairs if pair.compressed.runner.stop is not None]
                if not waiting and not pending:
                    break
                if not waiting:
                    next_position = pending[0][1]
                    continue
                key = min((_key(pair) for pair in waiting), key=self._position)
                if pending and next_position < self._position(key):
                    next_position = self._position(key)
                    continue
                here = [pair for pair in waiting if _key(pair) == key]
                self._visit(key, here)
                for pair in here:
                    pair.compressed.runner.advance()
            for pair in pairs:
                pair.finish()
                if finished is not None:
                    finished(pair)

    def _position(self, key: str) -> int:
        return self.order.get(key, len(self.order))

    def _catch_up(self, pair: Pair, position: int) -> None:
        """Starts a forward, and lets it pass the stops before a position."""
        stop = pair.compressed.runner.advance()
        while stop is not None and self._position(stop.key) < position:
            stop = pair.compressed.runner.advance()

    def _pair(self, batch: Any, runners: list[Runner], *, keep_output: bool) -> Pair:
        made = []
        for side, is_compressed in enumerate((True, False)):
            shortcuts = {name: numbers[side] for name, numbers in self.shortcuts.items()}
            forward = Forward(
                self.sources,
                batch,
                self.wanted,
                list(self.norms),
                is_compressed=is_compressed,
                shortcuts=shortcuts,
            )
            forward.keeps_output = keep_output
            made.append(forward)
            runners.append(forward.runner)
        return Pair(*made)

    def _visit(self, key: str, here: Sequence[Pair]) -> None:
        layer, norm = self.layers.get(key), self.norms.get(key)
        self.visited.append(key)
        for pair in here:
            stop = pair.compressed.runner.stop
            assert stop is not None
            value, stop.value = stop.value, None
            reference = pair.reach(key)
            if reference is None:
                continue
            if norm is not None:
                norm.observe(reference, value)
            if layer is not None:
                layer.observe(reference, value, self.positions)
        if norm is not None:
            norm.write()
        if layer is not None:
            self.arrived(layer)


def _key(pair: Pair) -> str:
    stop = pair.compressed.runner.stop
    return "" if stop is None else stop.key


def plain_output(sources: Sources, batch: Any) -> Any:
    """Returns the output of the compressed model as it is now, without stops."""
    forward = Forward(sources, batch, frozenset(), [], is_compressed=True, shortcuts={})
    with closing([forward.runner]):
        while forward.runner.advance() is not None:
            pass
    return forward.runner.result
