"""What notebooks and consoles show of controller, statistics, ledger and plan."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from compress_core import Plan, Table, TableStatistics, create_compressed_model
from compress_core.contract.ledger import Ledger
from compress_core.contract.statistics import CompressionStatistics

HOSTILE = "<script>alert('1')</script>&\"<b>"
# What tables are made of.
TAGS = {"p", "b", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """The texts and tags of a piece of HTML, which has to be well formed and to have nothing but tables."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS
        assert all(name == "style" and value.startswith("text-align") for name, value in attributes)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def shown(value):
    return Page(value._repr_html_())


def hostile_ledger():
    ledger = Ledger()
    ledger.record(HOSTILE, HOSTILE, HOSTILE, [HOSTILE])
    return ledger


VALUES = {
    "table": Table(HOSTILE, (HOSTILE, "value"), [(HOSTILE, 0.5), ("other", HOSTILE)]),
    "empty table": Table(HOSTILE, (HOSTILE,), []),
    "statistics": TableStatistics({HOSTILE: HOSTILE}, [Table(HOSTILE, (HOSTILE,), [(HOSTILE,)])], HOSTILE),
    "all statistics": CompressionStatistics({"mine": TableStatistics({HOSTILE: 1})}),
    "ledger": hostile_ledger(),
    "plan": Plan((HOSTILE,), {HOSTILE: HOSTILE}, {HOSTILE: [HOSTILE]}),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_hostile_names_are_text(value):
    page = shown(value)
    assert HOSTILE in page.text
    assert "<script" not in value._repr_html_()


def test_the_name_of_a_class_is_text():
    kind = type(HOSTILE, (nn.Sequential,), {})
    controller, _ = create_compressed_model(
        kind(nn.Linear(4, 4)), {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}}
    )
    assert f"Compressed {HOSTILE}, not trained yet" in shown(controller).text


def test_a_controller_shows_how_far_each_algorithm_is():
    config = {
        "compression": [
            {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target": 0.5}},
            {"algorithm": "knowledge_distillation", "type": "mse"},
        ]
    }
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    controller, _ = create_compressed_model(model, config)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    text = shown(controller).text
    assert "Compressed Sequential, epoch 0, step 0" in text
    assert "magnitude_sparsity" in text and "0.5" in text and controller.compression_stage().name in text
    assert "knowledge_distillation" in text
    assert repr(controller.statistics()) == "CompressionStatistics(magnitude_sparsity, knowledge_distillation, ledger)"
    for part in controller.statistics().tables():
        assert part.title in shown(controller.statistics()).text
    assert repr(controller.ledger) == f"Ledger({len(list(controller.ledger))} values)"
    model(torch.ones(2, 8)).sum().backward()
    controller.strip(do_copy=False)
    assert "stripped in place" in shown(controller).text


def test_short_in_a_console():
    plan = Plan(tuple(f"layer{n}.weight" for n in range(300)), {"fc": "first"}, {"groups": list(range(1000))})
    assert repr(plan) == "Plan(300 targets, 1 skipped, groups)"
    assert len(plan._repr_html_()) < 60_000
    assert repr(Table("Figures", ("a",), [(1,), (2,)])) == "Table('Figures': 2 rows)"
