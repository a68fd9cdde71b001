"""Footprints side by side: before and after, as a table and as the large figures of a page."""

from __future__ import annotations

from collections.abc import Mapping

from compress_core.contract.footprint import FIGURES, Figure, Footprint
from compress_core.contract.statistics import Table
from compress_core.pages import Figures

NAMES: Mapping[Figure, str] = {
    "parameters": "parameters",
    "nonzero": "parameters that are not zero",
    "operations": "operations (FLOPs of one sample)",
    "size": "bytes of the parameters in a file",
}
_SHORT: Mapping[Figure, str] = {
    "parameters": "Parameters",
    "nonzero": "Not zero",
    "operations": "FLOPs",
    "size": "Size",
}
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def comparison(title: str, columns: Mapping[str, Footprint]) -> Table:
    """Returns a table with a row for each figure and a column for each footprint.

    Args:
        title: The line above it.
        columns: Header -> footprint; the first is what the others are compared with.
    """
    before = next(iter(columns.values())).figures()
    rows = []
    for figure in FIGURES:
        values = [footprint.figures()[figure] for footprint in columns.values()]
        first, *others = values
        shown = ["unknown" if first is None else f"{first:,}"]
        shown += ["unknown" if v is None else f"{v:,}{_change(before[figure], v)}" for v in others]
        rows.append((NAMES[figure], *shown))
    return Table(title, ("figure", *columns), rows)


def headline(before: Footprint, after: Footprint) -> Figures:
    """Returns the figures of a page: what each is afterwards, and what it was before."""
    figures = []
    for figure in FIGURES:
        old, new = before.figures()[figure], after.figures()[figure]
        value = "unknown" if new is None else in_words(figure, new)
        remark = "" if old is None else f"of {in_words(figure, old)}{_change(old, new)}"
        figures.append((_SHORT[figure], value, remark))
    return Figures(figures)


def in_words(figure: Figure, value: int) -> str:
    """Returns a figure with four digits and a unit: 25.56 M, 97.8 MB, 8.178 G."""
    size, unit = next(((size, unit) for size, unit in _UNITS if value >= size), (1, ""))
    number = f"{value / size:.4g}" if size > 1 else str(value)
    return f"{number} {unit}{'B' if figure == 'size' else ''}".rstrip()


def _change(old: int | None, new: int | None) -> str:
    if not old or new is None or new == old:
        return ""
    return f" ({(new - old) / old:+.1%})"
