"""Pictures with matplotlib, which is an extra: their formats, a new figure, and the file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from compress_core.errors import ExportError, UsageError
from compress_core.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("png", "svg", "pdf")


def has_matplotlib() -> bool:
    """Returns whether pictures can be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - an extra
    except ImportError:
        return False
    return True


def check_format(path: str | os.PathLike[str]) -> str:
    """Returns the format that the ending of a file names.

    Raises:
        UsageError: The file has another ending than .png, .svg or .pdf.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise UsageError(f"path: '{path}' must end in .{', .'.join(_FORMATS)}")
    return kind


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ExportError: matplotlib is missing (`pip install 'compress-core[plot]'`).
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ExportError("a picture needs matplotlib: pip install 'compress-core[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format of the file's ending; the file appears completely or not at all.

    Raises:
        UsageError: See `check_format`.
        FileError: The file cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=check_format(path), dpi=120)
    with replaced_file(path) as file:
        file.write(drawn.getvalue())
