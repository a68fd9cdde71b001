"""`Page`: sections of blocks, and the file that they become."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress_core.errors import ExportError, UsageError
from compress_core.files import file_error, replaced_file
from compress_core.pages.blocks import Block, Flow, Grid, Picture
from compress_core.pages.charts import Rails


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading.

    Attributes:
        name: Its anchor in the page: letters, digits and `-`.
        title: The heading.
        blocks: What it holds; a section without blocks is left out.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Heading and title of the page.
        subtitle: The line below it.
        sections: Its parts, in order.
        footer: The line at the end, such as versions.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""

    def to_html(self) -> str:
        """Returns the page as one HTML document without scripts, fonts or addresses of other files.

        Raises:
            ExportError: jinja2 is missing (`pip install 'compress-core[report]'`).
        """
        sections = [section for section in self.sections if section.blocks]
        text: str = _template().render(page=self, sections=sections)
        return text


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes a page; the file appears completely or not at all.

    Raises:
        ExportError: jinja2 is missing.
        FileError: The file cannot be written.
        UsageError: The path does not end in .html.
    """
    check_path(path)
    text = page.to_html().encode(errors="backslashreplace")  # names may have halves of surrogate pairs
    with replaced_file(path) as file:
        file.write(text)


def check_path(path: str | os.PathLike[str], *, folder: bool = True) -> None:
    """Checks where a page is to be written, before somebody measures what it shows.

    Args:
        path: The file.
        folder: Whether to check that its folder exists, too.

    Raises:
        UsageError: It is no path of an HTML file, such as that of a config.
        FileError: Its folder does not exist.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path: must be the path of a file, got {type(path).__name__}")
    if Path(path).suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"path: '{path}' must end in .html")
    if folder and not Path(path).parent.is_dir():
        missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        raise file_error("cannot write", path, missing)


def check_installed() -> None:
    """Raises ExportError if jinja2 is missing, before somebody measures what then cannot be shown."""
    _template()


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ExportError("an HTML page needs jinja2: pip install 'compress-core[report]'") from error
    environment = Environment(
        loader=PackageLoader("compress_core.pages", "."),
        autoescape=True,  # names of layers and values of configs are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.tests["numeric"] = _is_number
    environment.tests["picture"] = lambda value: isinstance(value, Picture)
    environment.globals["rails"] = _rails
    environment.globals["numbers"] = _number_columns
    return environment.get_template("page.html.jinja")


def _rails(block: Flow) -> list[str]:
    return Rails(len(block.rows), block.links).pieces()


def _number_columns(block: Grid) -> set[int]:
    """Returns the columns whose cells are aligned to the right, as their head should be."""
    drawn = {*getattr(block, "shares", ()), *getattr(block, "lengths", ())}
    columns = [[cell for cell in cells if cell is not None] for cells in zip(*block.rows, strict=True)]
    return {n for n, cells in enumerate(columns) if cells and all(map(_is_number, cells))} - drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    """Returns a value as a reader wants it: four digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
