"""Figures about a compressed model, as tables and as JSON-able values."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tabulate import tabulate

from compress_core.pages.blocks import Block, Grid


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: The line above the table.
        headers: One for each column.
        rows: The cells of each row; numbers are formatted when the table is printed.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __repr__(self) -> str:
        return f"Table({self.title!r}: {len(self.rows)} rows)"

    def to_str(self) -> str:
        """Returns the table as plain text."""
        return f"{self.title}\n{self._in('simple_outline')}"

    def to_html(self) -> str:
        """Returns the table as HTML, without scripts and styles; what looks like HTML is shown as it is written."""
        return f"<p><b>{html.escape(self.title)}</b></p>\n{self._in('html')}"

    def to_grid(self) -> Grid:
        """Returns the table as a block of a page."""
        return Grid(self.title, self.headers, self.rows)

    def _repr_html_(self) -> str:
        return self.to_html()

    def _in(self, form: str) -> str:
        cells = [[_shown(cell) for cell in row] for row in self.rows]
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.headers)
        align = ["right" if all(isinstance(cell, (int, float)) for cell in column) else "left" for column in columns]
        return tabulate(cells, self.headers, form, colalign=align if cells else None, disable_numparse=True)


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


@dataclass(frozen=True)
class ByLayer:
    """A figure that there is one of for each layer, a column of a report's picture of the network.

    Attributes:
        title: The head of the column, such as `masked`.
        values: Dotted name of a weight or of a module -> the figure.
        kind: What the figure is: a share (0 to 1) of the weight's elements that is `zeros`; a share of its output
            channels that is `pruned`; the number of `bits` that its elements have; another `share`; or another
            `number`. The first three are drawn.
    """

    title: str
    values: Mapping[str, float]
    kind: Literal["zeros", "pruned", "bits", "share", "number"] = "number"


class Statistics:
    """Base class of what `compress_statistics` returns.

    A subclass implements `tables` and `to_dict`. A report of `controller.report` shows the tables, unless the class
    says more about how it wants to be shown: `blocks`, `by_layer`, `left_alone`.
    """

    def tables(self) -> Sequence[Table]:
        """Returns the report as tables."""
        raise NotImplementedError(f"{type(self).__name__} must implement tables()")

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON-able values."""
        raise NotImplementedError(f"{type(self).__name__} must implement to_dict()")

    def to_str(self) -> str:
        """Returns the report as plain text."""
        return "\n\n".join(table.to_str() for table in self.tables())

    def _repr_html_(self) -> str:
        return "\n".join(table.to_html() for table in self.tables())

    def blocks(self) -> Sequence[Block]:
        """Returns what a report shows, blocks of `compress_core.pages`; by default the tables."""
        return [table.to_grid() for table in self.tables()]

    def by_layer(self) -> Sequence[ByLayer]:
        """Returns the figures that there is one of for each layer, for the picture of the network; by default none."""
        return ()

    def left_alone(self) -> Mapping[str, str]:
        """Returns what was left as it is: dotted name -> the reason.

        What the plan of an algorithm has skipped (`Plan.skipped`) is in a report without this.
        """
        return {}


@dataclass(frozen=True)
class TableStatistics(Statistics):
    """Statistics made of a few named figures and tables; enough for most plugins.

    Attributes:
        values: Named figures, JSON-able.
        extra_tables: Tables that follow the table of figures.
        title: Title of the table of figures.
    """

    values: Mapping[str, Any]
    extra_tables: Sequence[Table] = ()
    title: str = "Statistics"

    def tables(self) -> Sequence[Table]:
        """Returns the figures as a table, then the other tables."""
        return [Table(self.title, ("figure", "value"), list(self.values.items())), *self.extra_tables]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, and each other table as a list of rows."""
        tables = {t.title: [dict(zip(t.headers, row, strict=True)) for row in t.rows] for t in self.extra_tables}
        return {**self.values, **({"tables": tables} if tables else {})}


@dataclass(frozen=True)
class CompressionStatistics(Statistics):
    """The statistics of all algorithms and initializers of a compressed model.

    The statistics of one of them are also an attribute: `statistics.magnitude_sparsity`.

    Attributes:
        parts: Statistics by name of the algorithm or initializer.
    """

    parts: Mapping[str, Statistics] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Statistics:
        try:
            return self.__dict__["parts"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(
                f"no statistics of '{name}'; there are {list(self.__dict__.get('parts', ()))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __repr__(self) -> str:
        return f"CompressionStatistics({', '.join(self.parts)})"

    def tables(self) -> Sequence[Table]:
        """Returns the tables of all parts."""
        return [table for part in self.parts.values() for table in part.tables()]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values by part."""
        return {name: part.to_dict() for name, part in self.parts.items()}

    def scalars(self) -> dict[str, int | float]:
        """Returns the figures that are numbers by path, for loggers: `magnitude_sparsity/sparsity_level`.

        What there is one of for each layer, and what is said in words, is left out.
        """
        return {
            f"{name}/{path}": value
            for name, part in self.parts.items()
            if name != "ledger"
            for path, value in _numbers(part.to_dict())
        }


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for name, value in values.items():
        key = str(name).replace(" ", "_")
        if isinstance(value, Mapping):
            yield from ((f"{key}/{path}", number) for path, number in _numbers(value))
        elif isinstance(value, (int, float)):
            yield key, int(value) if isinstance(value, bool) else value
