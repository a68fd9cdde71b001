"""What an adaptation did, as figures and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress_core.contract.statistics import Statistics, Table


@dataclass(frozen=True)
class GuardVerdict:
    """What the user's metric said of an adaptation.

    Attributes:
        before: The metric of the compressed model with the statistics of before.
        after: The metric with the adapted ones.
        kept: Whether these were kept; otherwise the old ones were put back.
    """

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class LayerDrift:
    """What adaptation did to a layer.

    Attributes:
        name: Dotted name.
        values: Number of values per channel that the estimate rests on; 0 when the layer was not reached.
        mean_shift: Largest |change of the running mean| over channels, in standard deviations of before.
        variance_ratio: Smallest and largest (variance now + eps) / (variance before + eps) over channels.
    """

    name: str
    values: int
    mean_shift: float
    variance_ratio: tuple[float, float]


@dataclass(frozen=True)
class AdaptationReport:
    """What one adaptation pass did.

    Attributes:
        method: Name of the estimator.
        requested_samples: What was asked for.
        samples: How many were used: whole batches.
        batches: In how many batches.
        seconds: Wall time.
        layers: By layer.
        guard: What the metric said, if there was a guard.
    """

    method: str
    requested_samples: int
    samples: int
    batches: int
    seconds: float
    layers: tuple[LayerDrift, ...]
    guard: GuardVerdict | None = None


class BatchNormAdaptationStatistics(Statistics):
    """The last adaptation: how it ran, and the drift of each layer."""

    def __init__(self, report: AdaptationReport) -> None:
        self.report = report

    def tables(self) -> list[Table]:
        """Returns the run, and the layers."""
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

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able values."""
        return asdict(self.report)
