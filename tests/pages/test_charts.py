"""Small drawings say what their numbers are, and the colors of pages have enough contrast."""

import itertools
import math
import re
from pathlib import Path

import pytest

import compress_core.pages
from compress_core.pages import Flow, Page, Panels, Picture, Section, columns_svg, histogram_svg, line_svg
from compress_core.pages.charts import Rails
from tests.html_helpers import cells, check

CSS = (Path(compress_core.pages.__file__).parent / "page.css").read_text()


def colors():
    """The variables of the style sheet, in light and in dark."""
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    return [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", found)) for found in (light, dark)]


def luminance(color):
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_have_the_contrast_that_wcag_asks_for(scheme):
    found = colors()[scheme]
    assert set(found) == set(colors()[0])
    # Text: 4.5 (WCAG 1.4.3); drawings: 3 (1.4.11).
    for text, ground in itertools.product(("text", "soft", "accent"), ("page", "card")):
        assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for drawn in ("accent", "zeros", "pruned", "warn", "soft"):
        assert contrast(found[drawn], found["page"]) >= 3, drawn


def test_the_formula_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def drawn_links(rails):
    """Follows the strokes from node to node: where each one that leaves a row arrives."""
    found, open_lanes = set(), {}
    for row, svg in enumerate(rails.pieces()):
        path = (re.search(r'<path d="([^"]*)"', svg) or [0, ""])[1]
        for x in re.findall(r"M(\d+) 0V8Q", path):
            found.add((open_lanes[x], row))
        open_lanes = {x: start for x, start in open_lanes.items() if f"M{x} 0V28" in path or f"M{x} 0V8" in path}
        if "M10 0V14" in path:
            found.add((row - 1, row))
        for x in re.findall(r"M10 14H\d+Q(\d+)", path):
            open_lanes[x] = row
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rails_draw_every_link(seed):
    import random

    draw = random.Random(seed)
    rows = draw.randint(2, 12)
    pairs = [(a, b) for a in range(rows) for b in range(a + 1, rows)]
    links = draw.sample(pairs, min(len(pairs), draw.randint(1, 8)))
    rails = Rails(rows, links, most=20)
    assert rails.left_out == 0
    assert drawn_links(rails) == set(links)


def test_rails_leave_out_what_has_no_room_and_what_goes_up():
    links = [(start, 30 - start) for start in range(12)] + [(5, 2), (3, 3), (-1, 4), (3, 99)]
    rails = Rails(31, links, most=4)
    assert rails.left_out == 8
    assert len(drawn_links(rails)) == 4
    assert Rails(0, []).pieces() == []


def test_bars_of_a_histogram_stand_for_counts():
    svg = histogram_svg([0, 1, 100, 10_000, 1], (1, 4))
    heights = {int(x) // 4: int(h) for x, h in re.findall(r"M(\d+) 28v-(\d+)h", svg)}
    assert heights == {
        n: math.ceil(26 * math.log1p(c) / math.log1p(10_000)) for n, c in ((1, 1), (2, 100), (3, 10_000), (4, 1))
    }
    outside = re.search(r'class="out" d="([^"]*)"', svg)[1]
    assert outside.startswith("M16 ")
    assert outside.count("M") == 1
    assert "path" in histogram_svg([0, 0], (0, 2))


def test_columns_and_lines_stand_for_their_values():
    svg = columns_svg([2.0, 4.0], [[("kept", 0.25), ("zeros", 0.75)], [("kept", 1.0), ("zeros", 0.0)]])
    assert re.findall(r"v-([\d.]+)h", re.search(r'class="kept" d="([^"]*)"', svg)[1]) == ["20.0", "160.0"]
    assert re.findall(r"v-([\d.]+)h", re.search(r'class="zeros" d="([^"]*)"', svg)[1]) == ["60.0"]
    points = re.findall(
        r"([ML])([\d.]+) ([\d.]+)",
        line_svg([0, 1, 2, 4], [1.0, math.nan, 3.0, 2.0]).split('class="end"')[1].split("/>", 1)[1],
    )
    assert points == [("M", "6.0", "74.0"), ("M", "120.0", "6.0"), ("L", "234.0", "40.0")]
    for empty in (line_svg([], []), line_svg([0], [math.inf]), columns_svg([], [])):
        assert empty.endswith("</svg>")


def test_flows_and_panels_on_a_page():
    picture = Picture(line_svg([0, 1], [0, 1]), "rises")
    flow = Flow(
        "Flow", ("layer", "zeros", "bits"), [("input", None, None), ("fc", 0.25, 4)], (1,), {2: 8}, [(0, 1)], [0]
    )
    text = Page("t", "s", [Section("a", "A", [flow, Panels([("loss", picture, "0 to 1")])])]).to_html()
    check(text)
    assert cells(text, "Flow")[1:] == [["", "input", "", ""], ["", "fc", "25.0 %", "4"]]
    assert "--share:0.5000" in text
