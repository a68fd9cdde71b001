"""HTML pages that stand alone: one file, no network, no JavaScript, readable in light, in dark and on a phone.

They are an extra: `pip install 'compress-core[report]'`.
"""

from compress_core.pages.blocks import Bars, Block, Details, Figures, Grid, Pairs, Picture, Text
from compress_core.pages.page import Page, Section, write_page
from compress_core.pages.svg import figure_svg

__all__ = [
    "Bars",
    "Block",
    "Details",
    "Figures",
    "Grid",
    "Page",
    "Pairs",
    "Picture",
    "Section",
    "Text",
    "figure_svg",
    "write_page",
]
