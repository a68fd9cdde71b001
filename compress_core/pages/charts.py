"""Small drawings made without matplotlib, of a few hundred bytes each: there may be one for each layer of a network.

Their colors are those of `page.css`, so they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_BAR, _HEIGHT = 4, 28


def histogram_svg(counts: Sequence[int], inside: tuple[int, int]) -> str:
    """Returns a histogram as an `<svg>` element; heights are logarithms, so that few values can be seen beside many.

    Args:
        counts: How often each bin was met.
        inside: First bin, and the bin behind the last, of those within limits; the others are drawn in a warning color.
    """
    first, last = inside
    most = math.log1p(max(counts, default=0)) or 1.0
    heights = [math.ceil((_HEIGHT - 2) * math.log1p(count) / most) if count else 0 for count in counts]
    shapes = []
    for name, chosen in (("in", range(first, last)), ("out", [*range(first), *range(last, len(counts))])):
        bars = "".join(
            f"M{_BAR * number} {_HEIGHT}v-{heights[number]}h{_BAR - 1}v{heights[number]}"
            for number in chosen
            if heights[number]
        )
        shapes.append(f'<path class="{name}" d="{bars}"/>' if bars else "")
    width = _BAR * len(counts)
    ends = "".join(f"M{_BAR * end - 0.5} 0v{_HEIGHT}" for end in inside)
    return (
        f'<svg class="spark" width="{width}" height="{_HEIGHT}" viewBox="0 0 {width} {_HEIGHT}">'
        f'{"".join(shapes)}<path class="end" d="{ends}"/></svg>'
    )


def columns_svg(heights: Sequence[float], parts: Sequence[Sequence[tuple[str, float]]], width: int = 720) -> str:
    """Returns columns side by side, each divided into parts from the bottom up.

    Args:
        heights: Height of each column; the largest fills the drawing.
        parts: For each column (class of the color in `page.css`, share of the column), from the bottom up.
        width: Width of the drawing in units; it is as wide as the page.
    """
    step, tall = width / max(len(heights), 1), 160.0
    top = max(heights, default=0.0) or 1.0
    paths: dict[str, list[str]] = {}
    for number, (height, shares) in enumerate(zip(heights, parts, strict=True)):
        bottom, left, wide = tall, number * step, max(step - (2 if step > 6 else 0.5), 0.5)
        wide = min(wide, 48.0)
        for color, share in shares:
            part = tall * height / top * share
            if part > 0:
                paths.setdefault(color, []).append(f"M{left:.1f} {bottom:.1f}v-{part:.1f}h{wide:.1f}v{part:.1f}z")
                bottom -= part
    drawn = "".join(f'<path class="{color}" d="{"".join(found)}"/>' for color, found in paths.items())
    # There is no text in it, so it can be as wide as the page.
    return (
        f'<svg class="columns" width="100%" height="161" viewBox="0 0 {width} 161" preserveAspectRatio="none">{drawn}'
        f'<path class="end" d="M0 160.5h{width}"/></svg>'
    )


def line_svg(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Returns a line through points as an `<svg>` element, scaled to fill it; a value that is not finite is a gap.

    Args:
        xs: Where the points are, ascending.
        ys: Their values.
    """
    wide, tall, edge = 240, 80, 6
    known = [y for y in ys if math.isfinite(y)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    across = (wide - 2 * edge) / ((xs[-1] - xs[0]) or 1) if len(xs) else 0.0
    up = (tall - 2 * edge) / (high - low) if high > low else 0.0
    path, pen = "", "M"
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        left, top = edge + across * (x - xs[0]), tall - edge - up * (y - low)
        # A short stroke shows a point that stands alone.
        path += f"{pen}{left:.1f} {top:.1f}" + ("h.1" if pen == "M" else "")
        pen = "L"
    return (
        f'<svg class="line" width="100%" height="{tall}" viewBox="0 0 {wide} {tall}" preserveAspectRatio="none">'
        f'<path class="end" d="M0 {tall - 0.5}H{wide}"/><path d="{path}"/></svg>'
    )


class Rails:
    """The links between the rows of a table, drawn in its first column, a piece for each row.

    A row's node is in the first lane. A link to the next row runs straight down; one to a later row leaves the node,
    runs down in a lane of its own, and comes back.

    Args:
        rows: Number of rows.
        links: (from, to) of each link, numbers of rows; those that do not go down are left out.
        most: Largest number of lanes; links for which none is free are not drawn.
    """

    def __init__(self, rows: int, links: Sequence[tuple[int, int]], most: int = 10) -> None:
        self._rows = rows
        ends: dict[int, list[int]] = {}
        for start, end in sorted(set(links)):
            if 0 <= start < end < rows:
                ends.setdefault(start, []).append(end)
        self._straight = {start for start, found in ends.items() if start + 1 in found}
        self._lanes: list[tuple[int, int, list[int]]] = []  # lane, first row, rows in which it comes back
        busy: list[int] = []  # the last row of each lane
        self.left_out = 0
        for start, found in sorted(ends.items()):
            far = [end for end in found if end > start + 1]
            if not far:
                continue
            lane = next((number for number, until in enumerate(busy) if until <= start), len(busy))
            if lane == most:
                self.left_out += len(far)
                continue
            busy[lane : lane + 1] = [far[-1]]
            self._lanes.append((lane + 1, start, far))
        self.width = 20 + 12 * len(busy)

    def pieces(self) -> list[str]:
        """Returns the drawing of each row as an `<svg>` element."""
        lines: list[list[str]] = [[] for _ in range(self._rows)]
        for start in self._straight:
            lines[start].append("M10 14V28")
            lines[start + 1].append("M10 0V14")
        for lane, start, far in self._lanes:
            x = 10 + 12 * lane
            lines[start].append(f"M10 14H{x - 6}Q{x} 14 {x} 20V28")
            for row in range(start + 1, far[-1]):
                lines[row].append(f"M{x} 0V28")
            for end in far:
                lines[end].append(f"M{x} 0V8Q{x} 14 {x - 6} 14H10")
        return [self._piece("".join(found)) for found in lines]

    def _piece(self, path: str) -> str:
        w = self.width
        drawn = f'<path d="{path}"/>' if path else ""
        return (
            f'<svg class="rails" aria-hidden="true" width="{w}" height="28" viewBox="0 0 {w} 28">'
            f'{drawn}<circle cx="10" cy="14" r="4"/></svg>'
        )
