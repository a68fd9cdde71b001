"""Figures of matplotlib as SVG that follows the colors of the page."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Black is the color of the text around the drawing, which is light in dark pages.
_BLACK = re.compile(r"#000000\b|#000\b|(?<=[:\"])black\b")


def figure_svg(figure: Figure, name: str) -> str:
    """Returns a figure as an `<svg>` element that can stand in a page.

    Text stays text, black becomes the color of the page's text, and the background is that of the page.

    Args:
        figure: The figure (`compress_core.pictures.new_figure`).
        name: A name that is unique within the page, because identifiers of its drawings share a space.
    """
    import matplotlib as mpl  # noqa: PLC0415 - an extra, which the figure comes from

    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _BLACK.sub("currentColor", text)
    prefix = "d" + hashlib.sha256(name.encode()).hexdigest()[:6]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
