"""What a page is made of. Each block is data; the template gives it its form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        rows: The cells of each row; numbers are aligned to the right.
    """

    kind = "grid"
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Bars(Block):
    """A table in which shares are drawn as bars; readable as numbers, too.

    Attributes:
        title: The line above it.
        headers: One for each column.
        rows: The cells of each row. A cell in a column of `shares` is a number from 0 to 1, or None.
        shares: Numbers of the columns that hold shares.
    """

    kind = "bars"
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shares: Sequence[int]


@dataclass(frozen=True)
class Picture(Block):
    """A drawing.

    Attributes:
        svg: What `figure_svg` returned.
        description: What it shows, in words, for those who cannot see it.
        caption: The line below it.
    """

    kind = "picture"
    svg: str
    description: str
    caption: str = ""


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
