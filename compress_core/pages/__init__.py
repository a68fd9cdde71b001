"""HTML pages that stand alone: one file, no network, no JavaScript, readable in light, in dark and on a phone.

They are an extra: `pip install 'compress-core[report]'`.
"""

from compress_core.pages.blocks import (
    Bars,
    Block,
    Code,
    Details,
    Figures,
    Flow,
    Grid,
    Pairs,
    Panels,
    Part,
    Picture,
    Text,
)
from compress_core.pages.charts import columns_svg, histogram_svg, line_svg
from compress_core.pages.page import Page, Section, write_page
from compress_core.pages.svg import figure_svg

__all__ = [
    "Bars",
    "Block",
    "Code",
    "Details",
    "Figures",
    "Flow",
    "Grid",
    "Page",
    "Pairs",
    "Panels",
    "Part",
    "Picture",
    "Section",
    "Text",
    "columns_svg",
    "figure_svg",
    "histogram_svg",
    "line_svg",
    "write_page",
]
