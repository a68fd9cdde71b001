"""Footprints side by side."""

import pytest
from torch import nn

from compress_core.contract.footprint import FIGURES, Footprint
from compress_core.session.figures import comparison, headline, in_words


def test_the_table_has_a_row_for_each_figure_and_the_change():
    before = Footprint.of_model(nn.Linear(100, 10, bias=False))
    after = before.with_levels({"weight": 0.5}).with_bits({"weight": 8})
    table = comparison("Figures", {"before": before, "after": after})
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == len(FIGURES)
    assert rows["parameters"] == ("1,000", "1,000")
    assert rows["parameters that are not zero"] == ("1,000", "500 (-50.0%)")
    assert rows["bytes of the parameters in a file"] == ("4,000", "1,000 (-75.0%)")
    assert rows["operations (FLOPs of one sample)"] == ("unknown", "unknown")


def test_the_large_figures():
    before = Footprint.of_model(nn.Linear(1000, 10, bias=False))
    after = before.with_bits({"weight": 8}).left_open("because", ("nonzero",))
    figures = {name: (value, remark) for name, value, remark in headline(before, after).figures}
    assert figures["Size"] == ("10 kB", "of 40 kB (-75.0%)")
    assert figures["Not zero"] == ("unknown", "of 10 k")
    assert figures["FLOPs"] == ("unknown", "")


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("parameters", 0, "0"),
        ("parameters", 999, "999"),
        ("parameters", 25_557_032, "25.56 M"),
        ("size", 102_228_128, "102.2 MB"),
        ("size", 12, "12 B"),
        ("operations", 8_178_368_512, "8.178 G"),
        ("operations", 999_999, "1000 k"),
        ("operations", 3_200_000_000_000, "3.2 T"),
    ],
)
def test_figures_in_words(figure, value, words):
    assert in_words(figure, value) == words
