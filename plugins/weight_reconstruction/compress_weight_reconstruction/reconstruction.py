"""One reconstruction: survey, solve layer by layer, compare, keep or roll back."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.batchnorm.guard import MetricGuard
from compress_core.config.scopes import ScopeFilter
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import running, without_traces
from compress_core.data.rng import preserved_rng
from compress_core.transforms.interrupts import interrupts_held
from compress_weight_reconstruction.layers import Layer
from compress_weight_reconstruction.norms import PairedNorm, norms_of
from compress_weight_reconstruction.outputs import OutputError
from compress_weight_reconstruction.passes import Pair, Pass, Sources
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.report import LayerError, ReconstructionReport
from compress_weight_reconstruction.runners import Surroundings
from compress_weight_reconstruction.survey import Candidate, Survey, candidates, layer_of

logger = logging.getLogger(__name__)

# Samples for comparing outputs, as a share of those that are solved with.
_HELD_OUT = 0.25


@dataclass(frozen=True)
class Settings:
    """What the config says; see `WeightReconstructionConfig`."""

    num_samples: int = 0
    damping: float = 0.1
    positions: int = 16
    path: str = ""

    def with_samples(self, samples: int) -> Settings:
        """Returns the same settings with another number of samples."""
        return dataclasses.replace(self, num_samples=samples)


class Reconstruction:
    """Reconstructs the weights of a model; an exception leaves it as it was.

    Args:
        model: The compressed model, in eval mode.
        reference: The uncompressed model, in eval mode; another object.
        data: The batches.
        settings: What the config says.
        scopes: What the user wants left alone.
        frozen: Names of batch norms that the user has frozen.
        metric: The user's metric, larger is better.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        data: CalibrationData,
        settings: Settings,
        scopes: ScopeFilter,
        frozen: frozenset[str],
        metric: Callable[[nn.Module], Any] | None,
    ) -> None:
        self._model, self._reference, self._data, self._settings = model, reference, data, settings
        self._metric = metric
        self._candidates, self._left_alone = candidates(model, reference, scopes)
        self._norms = norms_of(model, reference, scopes, set(frozen))
        self._saved = _Saved(model)
        self._errors: dict[str, LayerError] = {}
        self._notes: list[str] = []

    def run(self) -> ReconstructionReport:
        """Reconstructs, and returns the report."""
        started = time.perf_counter()
        with preserved_rng(self._data.loader):
            solving, others = self._batches()
        samples, held_out = (sum(size for _, size in batches) for batches in (solving, others))
        if not others:
            self._notes.append("the loader has no samples besides those solved with, so outputs are compared on these")
        try:
            with preserved_rng(self._data.loader), without_traces(self._model), running(self._model):
                report = self._reconstruct([b for b, _ in solving], [b for b, _ in others], samples)
        except BaseException:
            with interrupts_held():
                self._saved.restore()
            raise
        seconds = time.perf_counter() - started
        return dataclasses.replace(report, samples=samples, held_out=held_out, seconds=seconds)

    def _reconstruct(self, solving: list[Any], others: list[Any], samples: int) -> ReconstructionReport:
        sources = Sources(self._model, self._reference, self._data, Surroundings())
        wanted = frozenset(self._candidates)
        compared = others or solving
        before, after = OutputError(), OutputError()
        positions = Positions(self._settings.positions, samples)
        scout = Pass(sources, wanted, self._pairs(), positions)
        pairs: list[Pair] = []

        def surveyed(pair: Pair) -> None:
            before.add(*pair.outputs())
            pairs.append(pair)

        scout.run([(batch, True) for batch in compared], surveyed)
        survey = Survey.of(pairs)
        pairs.clear()
        self._saved.restore()
        order = {key: number for number, key in enumerate(dict.fromkeys(scout.visited))}
        layers, repeated = self._layers(survey)
        norms = self._pairs()
        if repeated:
            Pass(sources, frozenset(repeated), self._pairs(), positions, repeated, order).run(
                [(batch, True) for batch in solving], lambda pair: None
            )
            for layer in repeated.values():
                self._solve(layer)
        main = Pass(sources, frozenset(layers), norms, positions, layers, order, self._solve)
        counting = [(batch, True) for batch in solving] + [(batch, False) for batch in others]

        def compare(pair: Pair) -> None:
            if not others or not pair.counts:
                after.add(*pair.outputs())

        main.run(counting, compare)
        for norm in norms.values():
            norm.check(self._settings.path)
        errors = tuple(self._errors[name] for name in order if name in self._errors)
        values = before.value(), after.value()
        output = None if values[0] is None or values[1] is None else (values[0], values[1])
        return ReconstructionReport(samples, 0, 0.0, errors, self._left_alone, output, notes=tuple(self._notes))

    def _pairs(self) -> dict[str, PairedNorm]:
        trained = dict(self._reference.named_modules())
        return {name: PairedNorm(name, layer, trained[name]) for name, layer in self._norms.items()}

    def _layers(self, survey: Survey) -> tuple[dict[str, Layer], dict[str, Layer]]:
        once, repeated = {}, {}
        for name, candidate in self._candidates.items():
            reason = survey.why_not(name)
            if reason is not None:
                self._left_alone[name] = reason
                continue
            layer = layer_of(name, candidate, survey, self._model)
            (once if len(survey.compressed.calls[name]) == 1 else repeated)[name] = layer
        return once, repeated

    def _solve(self, layer: Layer) -> None:
        result = layer.solve(self._settings.damping)
        if isinstance(result, str):
            self._left_alone[layer.name] = result
            return
        self._errors[layer.name] = result
        logger.info("weight reconstruction: %s: error %.3g -> %.3g", layer.name, result.before, result.after)

    def _batches(self) -> tuple[list[tuple[Any, int]], list[tuple[Any, int]]]:
        """Returns (batch, number of samples) to solve with, and further ones for comparing outputs."""
        wanted, seen, held_out = self._settings.num_samples, 0, 0
        solving: list[tuple[Any, int]] = []
        others: list[tuple[Any, int]] = []
        for batch, size in self._data.batches(sys.maxsize):
            if not others and seen < wanted and not (seen and 2 * (wanted - seen) < size):
                solving.append((batch, size))
                seen += size
                continue
            others.append((batch, size))
            held_out += size
            if held_out >= _HELD_OUT * seen:
                break
        return solving, others


class _Saved:
    """The values of a model's parameters and running statistics, to restore them."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, values in self._values:
                if not torch.equal(tensor, values):
                    tensor.copy_(values)
