"""The report of an adaptation, as figures and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress_core.contract.statistics import Statistics, Table
from compress_core.pages import Bars, Block, Pairs


@dataclass(frozen=True)
class GuardVerdict:
    """The user's metric before and after an adaptation.

    Attributes:
        before: The metric of the compressed model with the old statistics.
        after: The metric with the adapted statistics.
        kept: Whether the adapted statistics were kept; otherwise the old ones were restored.
    """

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class LayerDrift:
    """How far adaptation moved the statistics of a layer.

    Attributes:
        name: Dotted name.
        values: Number of values per channel behind the estimate; 0 if the layer was not reached.
        mean_shift: Largest |change of the running mean| over channels, in old standard deviations.
        variance_ratio: Smallest and largest (new variance + eps) / (old variance + eps) over channels.
    """

    name: str
    values: int
    mean_shift: float
    variance_ratio: tuple[float, float]


@dataclass(frozen=True)
class AdaptationReport:
    """The result of one adaptation pass.

    Attributes:
        method: Name of the estimator.
        requested_samples: Number of samples requested.
        samples: Number of samples used, in whole batches.
        batches: Number of batches used.
        seconds: Wall time.
        layers: How far each layer moved.
        guard: The user's metric before and after, if there was a guard.
    """

    method: str
    requested_samples: int
    samples: int
    batches: int
    seconds: float
    layers: tuple[LayerDrift, ...]
    guard: GuardVerdict | None = None


class BatchNormAdaptationStatistics(Statistics):
    """Statistics of the last adaptation: its figures, and the drift of each layer."""

    def __init__(self, report: AdaptationReport) -> None:
        self.report = report

    def tables(self) -> list[Table]:
        """Returns a table of the run and a table of the layers."""
        report = self.report
        rows: list[tuple[str, Any]] = [
            ("method", report.method),
            ("samples asked for", report.requested_samples),
            ("samples used", report.samples),
            ("batches", report.batches),
            ("seconds", report.seconds),
        ]
        if report.guard is not None:
            rows += [
                ("metric before", report.guard.before),
                ("metric after", report.guard.after),
                ("kept", "yes" if report.guard.kept else "no: rolled back"),
            ]
        layers = [(d.name, d.values, d.mean_shift, d.variance_ratio[0], d.variance_ratio[1]) for d in report.layers]
        headers = ("layer", "values per channel", "largest mean shift / std", "var ratio min", "var ratio max")
        return [
            Table("Batch-norm adaptation", ("figure", "value"), rows),
            Table("Drift of the running statistics", headers, layers),
        ]

    def blocks(self) -> list[Block]:
        """Returns the figures of the run, and the drift of each layer with bars."""
        run, drift = self.tables()
        most = max((layer.mean_shift for layer in self.report.layers), default=0.0)
        return [Pairs(run.rows), Bars(drift.title, drift.headers, drift.rows, lengths={2: most})]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able values."""
        return asdict(self.report)
