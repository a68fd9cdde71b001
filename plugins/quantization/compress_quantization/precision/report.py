"""What a search for numbers of bits has measured: the frontier of budget and error, as a table and as a picture."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from compress_core import Statistics, Table
from compress_core.errors import UsageError
from compress_core.pages import Block, Picture, Text, figure_svg
from compress_core.pictures import check_format, has_matplotlib, new_figure, write_figure
from compress_core.saved import STRICT, Items, parsed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrontierPoint:
    """The best choice for one budget.

    Attributes:
        budget: The budget.
        used: What the choice costs, in the same unit.
        predicted: The error as the sum of the errors of single quantizers.
        measured: The error with all chosen bits together; None if it was not measured.
        chosen: Whether this is the choice that the config asks for.
    """

    budget: float
    used: float
    predicted: float
    measured: float | None = None
    chosen: bool = False


class _SavedPoint(BaseModel):
    model_config = STRICT
    budget: float
    used: float
    predicted: float
    measured: float | None
    chosen: bool


class _SavedReport(BaseModel):
    model_config = STRICT
    method: str
    unit: str
    error: str
    samples: Annotated[int, Field(ge=0)]
    points: Items[_SavedPoint]
    sensitivities: dict[str, dict[str, float]]


@dataclass(frozen=True)
class PrecisionReport(Statistics):
    """What a search has measured.

    Attributes:
        method: The method.
        unit: What budgets are counted in, in words.
        error: What errors are, in words.
        samples: Number of samples that errors were measured on.
        points: The frontier, ascending by budget.
        sensitivities: Names of quantizers that are decided together, joined by ` + ` -> number of bits -> the error
            with these quantizers alone at this number of bits.
    """

    method: str
    unit: str
    error: str
    samples: int
    points: tuple[FrontierPoint, ...] = ()
    sensitivities: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def tables(self) -> Sequence[Table]:
        """Returns the frontier, and the errors of single quantizers."""
        rows = [
            (
                p.budget,
                p.used,
                p.predicted,
                "-" if p.measured is None else f"{p.measured:.4g}",
                "chosen" if p.chosen else "",
            )
            for p in self.points
        ]
        title = f"Precision by {self.method}: budget in {self.unit}, error: {self.error}, {self.samples} samples"
        found = [Table(title, ("budget", "used", "predicted error", "measured error", ""), rows)] if rows else []
        by_bits = self.sensitivities
        widths = sorted({bits for errors in by_bits.values() for bits in errors})
        if by_bits:
            cells = [
                (name, *(f"{errors[b]:.3g}" if b in errors else "-" for b in widths))
                for name, errors in by_bits.items()
            ]
            headers = ("quantizers", *(f"{bits} bits" for bits in widths))
            found.append(Table("Precision: error with these quantizers alone", headers, cells))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        by_bits = self.sensitivities
        return {
            "method": self.method,
            "unit": self.unit,
            "error": self.error,
            "samples": self.samples,
            "points": [asdict(point) for point in self.points],
            "sensitivities": {name: {str(b): e for b, e in errors.items()} for name, errors in by_bits.items()},
        }

    @classmethod
    def from_dict(cls, values: Any, path: str) -> PrecisionReport:
        """Restores a report from what `to_dict` returned.

        Raises:
            StateError: `values` was not returned by `to_dict`; the message names the place below `path`.
        """
        saved = parsed(_SavedReport, values, path)
        points = tuple(FrontierPoint(**point.model_dump()) for point in saved.points)
        by_bits = {n: {int(b): e for b, e in errors.items()} for n, errors in saved.sensitivities.items()}
        return cls(saved.method, saved.unit, saved.error, saved.samples, points, by_bits)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws the frontier: the predicted and the measured error over what the choices cost.

        Args:
            path: A .png, .svg or .pdf file.

        Raises:
            UsageError: There is no frontier, or the file has another ending.
            ExportError: matplotlib is missing (`pip install 'compress-core[plot]'`).
            FileError: The file cannot be written.
        """
        check_format(path)
        if not self.points:
            raise UsageError("the report has no frontier; set initializer.precision.frontier_points above 0")
        write_figure(self._figure(), path)

    def _figure(self) -> Figure:
        figure = new_figure(7, 4.5)
        axes = figure.subplots()
        used = [point.used for point in self.points]
        axes.plot(used, [_positive(point.predicted) for point in self.points], "o--", label="predicted")
        known = [point for point in self.points if point.measured is not None]
        axes.plot([p.used for p in known], [_positive(p.measured) for p in known], "s-", label="measured")
        for point in self.points:
            if point.chosen:
                axes.axvline(point.used, color="gray", linestyle=":", linewidth=1, label="chosen")
        axes.set_yscale("log")
        axes.set_xlabel(self.unit)
        axes.set_ylabel(textwrap.fill(self.error, 45))
        axes.set_title(f"Precision by {self.method}, {self.samples} samples", fontsize=10)
        axes.legend(fontsize=8, framealpha=0)  # a page may be dark
        return figure

    def blocks(self) -> Sequence[Block]:
        """Returns the frontier as a picture, and the tables."""
        tables: list[Block] = [table.to_grid() for table in self.tables()]
        if not self.points:
            return tables
        if not has_matplotlib():
            return [Text("The frontier as a picture needs matplotlib: pip install 'compress-core[report]'."), *tables]
        words = f"Error ({self.error}) over {self.unit}, for each budget of the search; a table has the figures."
        picture = Picture(figure_svg(self._figure(), "precision"), words, "The frontier of budget and error")
        return [picture, *tables]


def _positive(value: float | None) -> float:
    """Returns a value for a logarithmic axis, which does not draw what is not a number."""
    return value if value is not None and value > 0 else math.nan
