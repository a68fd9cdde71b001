"""One reconstruction: survey, solve layer by layer, compare, keep or roll back."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress_core.batchnorm.guard import MetricGuard
from compress_core.config.scopes import ScopeFilter
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import running, without_traces
from compress_core.data.progress import ProgressBar, progress, progress_bar
from compress_core.data.rng import preserved_rng
from compress_core.transforms.interrupts import interrupts_held
from compress_weight_reconstruction.batches import Batches
from compress_weight_reconstruction.layers import Layer
from compress_weight_reconstruction.norms import PairedNorm, norms_of
from compress_weight_reconstruction.outputs import OutputError
from compress_weight_reconstruction.passes import Pair, Pass, Sources, plain_output
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.report import LayerError, ReconstructionReport
from compress_weight_reconstruction.runners import Surroundings
from compress_weight_reconstruction.saved import SavedTensors
from compress_weight_reconstruction.survey import Survey, candidates, layer_of

logger = logging.getLogger(__name__)

# Below this, errors of outputs are rounding.
_NOTHING = 1e-8


@dataclass(frozen=True)
class Settings:
    """What the config says; see `WeightReconstructionConfig`."""

    num_samples: int = 0
    damping: float = 0.1
    positions: int = 16
    memory: float = 1.5
    path: str = ""


@dataclass
class _Found:
    """What becomes known in the course of a reconstruction."""

    errors: dict[str, LayerError] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
        self._model, self._settings, self._metric = model, settings, metric
        self._sources = Sources(model, reference, data, Surroundings())
        self._found = _Found()
        self._bar: ProgressBar | None = None
        self._candidates, self._found.left_alone = candidates(model, reference, scopes)
        self._norms = norms_of(model, reference, scopes, frozen)
        self._saved = SavedTensors(model, [candidate.weight for candidate in self._candidates.values()])

    def run(self) -> ReconstructionReport:
        """Reconstructs, and returns the report."""
        started = time.perf_counter()
        with preserved_rng(self._sources.data.loader):
            batches = Batches.read(self._sources.data, self._settings.num_samples)
            try:
                with without_traces(self._model):
                    report = self._reconstruct(batches)
            except BaseException:
                with interrupts_held():
                    self._saved.restore()
                raise
        if not report.kept:
            self._saved.restore()
            logger.warning("weight reconstruction: the weights stay as they were: %s", report.reason)
        return dataclasses.replace(report, seconds=time.perf_counter() - started)

    def _reconstruct(self, batches: Batches) -> ReconstructionReport:
        if not self._candidates:
            self._found.notes.append("there is no weight to reconstruct")
            return self._report(batches, None)
        with progress_bar("weight reconstruction: first forwards", len(batches.compared), unit="batch") as bar:
            survey, expected = self._survey(batches, bar)
        before = self._output_error(batches, expected)
        guard = None
        if self._metric is not None:
            # What the user would have without reconstruction: the old weights, with adapted batch norms.
            guard = MetricGuard(self._metric, self._model, f"{self._settings.path}.guard")
        self._saved.restore()
        with progress_bar("weight reconstruction: layers", len(self._candidates), unit="weight") as self._bar:
            self._solve_all(batches, survey)
        after = self._output_error(batches, expected)
        report = self._report(batches, None if before is None or after is None else (before, after))
        if guard is not None:
            verdict = guard.verdict()
            report = dataclasses.replace(report, metric=(verdict.before, verdict.after))
            if not verdict.kept:
                reason = f"the metric fell from {verdict.before:g} to {verdict.after:g}"
                return dataclasses.replace(report, kept=False, reason=reason)
        if before is not None and after is not None and after > max(before, _NOTHING):
            reason = (
                f"the error of the model's output would be {after:.3g}, and is {before:.3g} with batch norm adapted "
                "alone; try more samples, or more damping"
            )
            return dataclasses.replace(report, kept=False, reason=reason)
        return report

    def _survey(self, batches: Batches, bar: ProgressBar) -> tuple[Survey, list[Any]]:
        """Runs both models on the batches for comparing, and adapts the batch norms to these.

        Returns:
            What was seen, and the outputs of the uncompressed model.
        """
        scout = Pass(self._sources, frozenset(self._candidates), self._paired_norms(), self._positions(batches))
        pairs: list[Pair] = []

        def finished(pair: Pair) -> None:
            pairs.append(pair)
            bar.update()

        with running(self._model):
            scout.run([(batch, 0) for batch in batches.compared], finished)
        # From here on the twins share the buffers that no forward writes to.
        sides = ([pair.compressed for pair in pairs], [pair.reference for pair in pairs])
        ours, theirs = (frozenset().union(*(forward.writes.found() for forward in side)) for side in sides)
        self._sources = dataclasses.replace(self._sources, private=(ours, theirs))
        outputs = [pair.reference.runner.result for pair in pairs]
        return Survey.of(pairs, scout.visited, batches.compared_samples), outputs

    def _solve_all(self, batches: Batches, survey: Survey) -> None:
        once, repeated = self._layers(survey)
        positions, norms = self._positions(batches), self._paired_norms()
        joining = batches.within(self._settings.memory, survey.held)
        if repeated:
            # Their later calls depend on their earlier ones, so they are solved after a pass in which they are fixed.
            gather = Pass(self._sources, _names(repeated), self._paired_norms(), positions, repeated, survey.order)
            with running(self._model):
                gather.run(joining)
            for layer in repeated.values():
                self._solve(layer)
        main = Pass(self._sources, _names(once), norms, positions, once, survey.order, self._solve, survey.shortcuts)
        with running(self._model):
            main.run(joining)
        for name in once.keys() - self._found.errors.keys() - self._found.left_alone.keys():
            self._found.left_alone[name] = "no batch has reached it"
        for norm in norms.values():
            norm.check(self._settings.path)

    def _layers(self, survey: Survey) -> tuple[dict[str, Layer], dict[str, Layer]]:
        """Returns the layers to solve: those that are called once, and those that are called several times."""
        once: dict[str, Layer] = {}
        repeated: dict[str, Layer] = {}
        for name, candidate in self._candidates.items():
            reason = survey.why_not(name)
            if reason is not None:
                self._found.left_alone[name] = reason
                continue
            for part in survey.compressed.parts(name):
                layer = layer_of(part, candidate, survey, self._model, self._sources.reference)
                (once if len(survey.compressed.calls[part]) == 1 else repeated)[part] = layer
        return once, repeated

    def _solve(self, layer: Layer) -> None:
        if layer.name in self._found.errors or layer.name in self._found.left_alone:
            return  # batches that come later by another way pass it with the weight that it has now
        result = layer.solve(self._settings.damping)
        if self._bar is not None:
            self._bar.update()
        if isinstance(result, str):
            self._found.left_alone[layer.name] = result
            return
        self._found.errors[layer.name] = result
        logger.info("weight reconstruction: %s: error %.3g -> %.3g", layer.name, result.before, result.after)

    def _output_error(self, batches: Batches, expected: list[Any]) -> float | None:
        error = OutputError()
        pairs = list(zip(batches.compared, expected, strict=True))
        for batch, output in progress(pairs, "weight reconstruction: error of the outputs", unit="batch"):
            with running(self._model):
                error.add(plain_output(self._sources, batch), output)
        return error.value()

    def _report(self, batches: Batches, output_error: tuple[float, float] | None) -> ReconstructionReport:
        if 2 * batches.samples < self._settings.num_samples:
            logger.warning(
                "weight reconstruction: %d samples were asked for, %d are used",
                self._settings.num_samples,
                batches.samples,
            )
        return ReconstructionReport(
            batches.samples,
            batches.held_out,
            0.0,
            tuple(self._found.errors.values()),
            dict(self._found.left_alone),
            output_error,
            notes=tuple(self._found.notes + batches.notes),
            norms=tuple(self._norms),
        )

    def _paired_norms(self) -> dict[str, PairedNorm]:
        trained = dict(self._sources.reference.named_modules())
        return {name: PairedNorm(name, layer, trained[name]) for name, layer in self._norms.items()}

    def _positions(self, batches: Batches) -> Positions:
        return Positions(self._settings.positions, batches.samples)


def _names(layers: Mapping[str, Layer]) -> frozenset[str]:
    return frozenset(layer.weight_name for layer in layers.values())
