"""Pages hold everything in one file, and show the user's names as names."""

import re
import sys

import pytest

from compress_core.errors import ExportError
from compress_core.pages import (
    Bars,
    Details,
    Figures,
    Grid,
    Page,
    Pairs,
    Picture,
    Section,
    Text,
    figure_svg,
    page,
    write_page,
)
from compress_core.pictures import new_figure
from tests.html_helpers import check, read

HOSTILE = "<script>alert(\"x\")</script> & 'quoted'"


def drawing(name):
    figure = new_figure(4, 2)
    axes = figure.subplots()
    axes.fill_between([0, 1], [1, 2], hatch="//")
    axes.set_title("accuracy")
    return figure_svg(figure, name)


def whole_page():
    blocks = [
        Text(HOSTILE),
        Figures([(HOSTILE, HOSTILE, HOSTILE), ("size", "3 MB", "")]),
        Pairs([(HOSTILE, HOSTILE), ("none", None), ("flag", True)]),
        Grid(HOSTILE, (HOSTILE, "number"), [(HOSTILE, 12345), (None, 0.123456)]),
        Bars("Layers", ("layer", "zeros"), [(HOSTILE, 0.25), ("other", None)], shares=(1,)),
        Picture(drawing("one"), HOSTILE, HOSTILE),
        Details(HOSTILE, [Text("inside"), Picture(drawing("two"), "again")]),
    ]
    return Page(HOSTILE, HOSTILE, [Section("a", HOSTILE, blocks), Section("b", "left out", [])], HOSTILE)


def test_a_page_is_well_formed_and_alone():
    reader = check(whole_page().to_html())
    assert "left out" not in "".join(reader.text)


def test_names_are_shown_as_they_are():
    text = "".join(read(whole_page().to_html()).text)
    # 4 in head and headings, 1 text, 3 in figures, 2 in pairs, 3 + 1 in tables, then caption, summary and footer.
    assert text.count(HOSTILE) == 17
    assert "12,345" in text
    assert "0.1235" in text
    assert "25.0 %" in text


def test_drawings_follow_the_page_and_do_not_change():
    text = drawing("one")
    assert text == drawing("one")
    assert "currentColor" in text
    assert not re.search("#000000|black", text)
    assert "accuracy" in text
    # Black text has no color of its own there, and that of SVG is black: the page sets it.
    assert re.search(r"<text (?![^>]*fill)", text)
    assert ".whole svg text { fill: currentColor; }" in whole_page().to_html()
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text))
    assert used <= set(re.findall(r'\bid="([^"]+)"', text))
    assert used.isdisjoint(re.findall(r'\bid="([^"]+)"', drawing("two")))


def test_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_page(whole_page(), path)
    assert path.read_text() == whole_page().to_html()
    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ExportError, match=r"pip install 'compress-core\[report\]'"):
        write_page(Page("other", "", []), path)
    monkeypatch.undo()
    assert path.read_text() == whole_page().to_html()
