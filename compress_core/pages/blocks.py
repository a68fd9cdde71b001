"""What a page is made of. Each block is data; the template gives it its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


class Block:
    """A part of a page.

    Attributes:
        kind: Name of its macro in the template.
    """

    kind: ClassVar[str]


@dataclass(frozen=True)
class Text(Block):
    """A paragraph.

    Attributes:
        text: Plain text; what looks like HTML is shown as it is written.
    """

    kind = "text"
    text: str


@dataclass(frozen=True)
class Figures(Block):
    """The few figures that matter, in large letters.

    Attributes:
        figures: (name, value, a remark such as what it was before) of each.
    """

    kind = "figures"
    figures: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Pairs(Block):
    """Names and values, one below the other.

    Attributes:
        pairs: (name, value) of each.
    """

    kind = "pairs"
    pairs: Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Grid(Block):
    """A table.

    Attributes:
        title: The line above it.
        headers: One for each column.
        rows: The cells of each row; numbers are aligned to the right, and a `Picture` is drawn.
    """

    kind = "grid"
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Bars(Grid):
    """A table in which shares and other sizes are drawn as bars; readable as numbers, too.

    Attributes:
        title: The line above it.
        headers: One for each column.
        rows: The cells of each row. A cell in a column of `shares` or `lengths` is a number, or None.
        shares: Numbers of the columns that hold shares, 0 to 1.
        lengths: Number of a column of other figures -> the figure that is a full bar.
    """

    kind = "bars"
    shares: Sequence[int] = ()
    lengths: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flow(Bars):
    """Such a table of steps that feed one another, with the links between them drawn beside it.

    Attributes:
        links: (from, to) of each link, numbers of rows; each goes down.
        small: Numbers of the rows that are printed softly, such as sums between layers.
    """

    kind = "flow"
    links: Sequence[tuple[int, int]] = ()
    small: Sequence[int] = ()


@dataclass(frozen=True)
class Picture(Block):
    """A drawing.

    Attributes:
        svg: What `figure_svg`, `histogram_svg` or `columns_svg` returned.
        description: What it shows, in words, for those who cannot see it.
        caption: The line below it.
    """

    kind = "picture"
    svg: str
    description: str
    caption: str = ""


@dataclass(frozen=True)
class Panels(Block):
    """Small drawings side by side, as many in a row as the page has room for.

    Attributes:
        panels: (name, drawing, a remark) of each.
    """

    kind = "panels"
    panels: Sequence[tuple[str, Picture, str]]


@dataclass(frozen=True)
class Code(Block):
    """Text of which spaces and lines are kept, such as a config.

    Attributes:
        title: What it is.
        text: The text.
    """

    kind = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Part(Block):
    """Blocks below a heading within a section.

    Attributes:
        title: The heading.
        blocks: What it holds.
    """

    kind = "part"
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Details(Block):
    """Blocks that are folded away until the reader opens them.

    Attributes:
        summary: The line that is always shown.
        blocks: What it hides.
    """

    kind = "details"
    summary: str
    blocks: Sequence[Block]
