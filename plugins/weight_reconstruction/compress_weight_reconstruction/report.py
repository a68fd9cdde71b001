"""The report of a reconstruction, as figures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compress_core import StateError, Statistics, Table
from compress_core.pages import Bars, Block, Pairs

Report = TypeVar("Report")


@dataclass(frozen=True)
class LayerError:
    """How well a layer's output agrees with that of the uncompressed model.

    Attributes:
        name: Dotted name of the weight.
        positions: Number of outputs behind the estimate, for each channel.
        before: Mean squared error with the old weight, divided by the variance of what the output should be: that of
            the uncompressed model, and a part of the error of a residual sum's shortcut.
        after: The same with the new weight.
    """

    name: str
    positions: int
    before: float
    after: float


@dataclass(frozen=True)
class ReconstructionReport:
    """The result of one reconstruction.

    Attributes:
        samples: Number of samples that the weights were solved with.
        held_out: Number of other samples that the model's output was compared on; 0 if there were no others.
        seconds: Wall time.
        layers: The errors of each layer, in the order of the forward.
        left_alone: Name of a weight -> why it was not changed.
        output_error: Mean squared error of the model's output, divided by its variance: of the compressed model with
            adapted batch norms, and after reconstruction. None if the forward returns no tensor.
        kept: Whether the new weights were kept.
        reason: Why not; empty if they were kept.
        metric: The user's metric before and after; None without a guard.
        notes: What else the user should know.
        norms: Names of the batch norms that may be corrected; the user has frozen or ignored the others.
    """

    samples: int
    held_out: int
    seconds: float
    layers: tuple[LayerError, ...]
    left_alone: Mapping[str, str]
    output_error: tuple[float, float] | None = None
    kept: bool = True
    reason: str = ""
    metric: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def loaded(kind: type[Report], state: Mapping[str, Any], name: str, what: str) -> Report:
    """Returns a report that was saved by `Statistics.to_dict`.

    Args:
        kind: Its class.
        state: What was saved.
        name: Name of the initializer.
        what: What the report is of, for the message.

    Raises:
        StateError: The state is no such report.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(state))
    except ValidationError as error:
        raise StateError(f"compression_state.initializers.{name} is not the report of {what}: {error}") from error


class WeightReconstructionStatistics(Statistics):
    """Statistics of the last reconstruction: its figures, the errors of each layer, and what was left alone."""

    def __init__(self, report: ReconstructionReport) -> None:
        self.report = report

    def tables(self) -> list[Table]:
        """Returns tables of the run, of the layers, and of the weights that were left alone."""
        report = self.report
        rows: list[tuple[str, Any]] = [
            ("samples", report.samples),
            ("samples held out", report.held_out),
            ("seconds", report.seconds),
        ]
        if report.output_error is not None:
            rows += [("output error before", report.output_error[0]), ("output error after", report.output_error[1])]
        if report.metric is not None:
            rows += [("metric before", report.metric[0]), ("metric after", report.metric[1])]
        rows.append(("kept", "yes" if report.kept else f"no: {report.reason}"))
        rows += [("note", note) for note in report.notes]
        layers = [(layer.name, layer.positions, layer.before, layer.after) for layer in report.layers]
        tables = [
            Table("Weight reconstruction", ("figure", "value"), rows),
            Table("Errors relative to the variance", ("weight", "positions", "before", "after"), layers),
        ]
        if report.left_alone:
            tables.append(Table("Weights left alone", ("weight", "reason"), list(report.left_alone.items())))
        return tables

    def blocks(self) -> list[Block]:
        """Returns the figures of the run, and the errors of each layer with bars."""
        run, errors = self.tables()[:2]
        largest = max((max(layer.before, layer.after) for layer in self.report.layers), default=0.0)
        bars = Bars(errors.title, errors.headers, errors.rows, lengths={2: largest, 3: largest})
        return [Pairs(run.rows), bars]  # type: ignore[arg-type]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the weights that were not changed."""
        return self.report.left_alone

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able values."""
        return asdict(self.report)
