"""`compress-core plan`: from a config and the name of a model to a text, JSON or a page."""

import json
import re
import sys

import pytest

from compress_core.__main__ import main
from tests.conftest import ROOT

NETWORK = """
import torch
from torch import nn

print("the file is imported")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        print("the forward runs")
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))


network = Network
made = Network()


def breaks():
    raise RuntimeError("no weights\\\\nanywhere")
"""
SPARSE = {"compression": {"algorithm": "magnitude_sparsity", "params": {"sparsity_target": 0.5}}}
PRUNED = {
    "input_info": {"sample_size": [1, 3, 12, 12]},
    "compression": [
        {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "prune_first_conv": True}},
        {"algorithm": "quantization"},
    ],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "sparse.json").write_text(json.dumps(SPARSE))
    (tmp_path / "pruned.json").write_text(json.dumps(PRUNED))
    (tmp_path / "wrong.json").write_text(
        json.dumps({"compression": {"algorithm": "magnitude_sparsity", "a": 1, "b": 2}})
    )
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments):
    return main(["plan", *map(str, arguments)])


def test_the_text_tells_sizes_changes_reasons_and_the_config(files, capsys):
    assert plan("pruned.json", "--model", "net.py:network") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Network: before and after\n")
    for part in ("16 to 8 filters", "filter_pruning: left alone", "8 bits", "params.pruning_target", "FLOPs"):
        assert part in captured.out
    assert "the forward runs" not in captured.out  # what the model's own code prints
    assert "the forward runs" in captured.err


def test_every_target_has_a_line_with_all(files, capsys):
    assert plan("pruned.json", "--model", "net.py:network", "--all") == 0
    out = capsys.readouterr().out
    for name in ("first.weight", "second.weight", "last.weight", "first|WEIGHT", "second|WEIGHT", "last|WEIGHT"):
        assert name in out


@pytest.mark.parametrize("model", ["net.py:network", "net.py:made", "net:network"])
def test_json_is_all_that_is_printed(model, files, capsys):
    assert plan("pruned.json", "--model", model, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"] == "Network"
    before, after = values["before"], values["at_end"]
    # Both convolutions lose half of their 16 filters.
    assert before["parameters"] == 16 * 27 + 16 + 16 * 16 * 9 + 16 + 16 * 4 + 4
    assert after["parameters"] == 8 * 27 + 8 + 8 * 8 * 9 + 8 + 8 * 4 + 4
    assert before["operations"] == 2 * (100 * 16 * 27 + 64 * 16 * 16 * 9 + 64)
    assert after["operations"] == 2 * (100 * 8 * 27 + 64 * 8 * 8 * 9 + 32)


def test_the_shape_on_the_command_line_takes_precedence(files, capsys):
    assert plan("pruned.json", "--model", "net.py:network", "--json", "--input", "2,3,8,8") == 0
    assert json.loads(capsys.readouterr().out)["before"]["operations"] == 2 * (36 * 16 * 27 + 16 * 16 * 16 * 9 + 64)


def test_without_an_example_input_operations_are_unknown(files, capsys):
    assert plan("sparse.json", "--model", "net.py:network") == 0
    out = capsys.readouterr().out
    assert "no example input" in out
    assert plan("sparse.json", "--model", "net.py:network", "--input", "1,3,12,12") == 0
    assert "no example input" not in capsys.readouterr().out


def test_a_page_is_written(files, capsys):
    assert plan("pruned.json", "--model", "net.py:network", "--html", "plan.html") == 0
    out = capsys.readouterr().out
    assert "before and after" in out
    assert "plan.html: written" in out
    text = (files / "plan.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "16 to 8 filters" in text
    assert "<script" not in text


def test_a_page_and_json(files, capsys):
    assert plan("pruned.json", "--model", "net.py:network", "--html", "plan.html", "--json") == 0
    json.loads(capsys.readouterr().out)
    assert (files / "plan.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json", "--model", "net.py:network"), "none.json"),
        (("broken.json", "--model", "net.py:network"), "broken.json"),
        (("sparse.json", "--model", "net.py:nothing"), "no attribute 'nothing'"),
        (("sparse.json", "--model", "other.py:network"), "no file other.py"),
        (("sparse.json", "--model", "net.py"), "does not name a model"),
        (("sparse.json", "--model", "net.py:breaks"), "breaks() fails: RuntimeError"),
        (("sparse.json", "--model", "net.py:network", "--input", "1x3"), "--input 1x3: is no shape"),
        (("pruned.json", "--model", "net.py:network", "--input", "1,4,8,8"), "fails"),
        (("sparse.json", "--model", "net.py:network", "--html", "no/such/folder/plan.html"), "no/such/folder"),
        (("sparse.json", "--model", "net.py:network", "--html", "."), "."),
    ],
)
def test_errors_are_one_line(arguments, message, files, capsys):
    assert plan(*arguments) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("compress-core plan: ")]
    assert captured.out == ""
    assert len(lines) == 1
    assert message in lines[0]


def test_each_problem_of_the_config_has_a_line_as_in_check(files, capsys):
    assert plan("wrong.json", "--model", "net.py:network") == 1
    lines = capsys.readouterr().err.splitlines()
    assert main(["check", "wrong.json"]) == 1
    problems = [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]
    assert len(problems) == 2
    assert [line for line in lines if line.startswith("compress-core plan: ")] == [
        f"compress-core plan: {problem}" for problem in problems
    ]


def test_without_jinja2_the_page_is_refused_and_the_text_is_there(files, capsys, monkeypatch):
    from compress_core.pages import page

    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert plan("sparse.json", "--model", "net.py:network", "--html", "plan.html") == 1
    assert "compress-core[report]" in capsys.readouterr().err
    assert not (files / "plan.html").exists()
    assert plan("sparse.json", "--model", "net.py:network") == 0


def test_a_model_is_required(files, capsys):
    with pytest.raises(SystemExit):
        plan("sparse.json")
    assert "--model" in capsys.readouterr().err


def test_the_document_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    document = (ROOT / "docs" / "plan.md").read_text()
    network, config, printed = (
        re.search(pattern, document, re.DOTALL).group(1)
        for pattern in (r"```python\n(.*?)```", r"```json\n(.*?)```", r"```\n\$ compress-core plan [^\n]*\n(.*?)```")
    )
    (tmp_path / "network.py").write_text(network)
    (tmp_path / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    assert plan("config.json", "--model", "network.py:Network") == 0
    # Where a plugin comes from depends on how it is installed.
    without = re.compile(r"(?<=would change) \(.*")
    assert without.sub("", capsys.readouterr().out) == without.sub("", printed)


def test_a_page_does_not_replace_another_kind_of_file(files, capsys):
    before = (files / "pruned.json").read_text()
    assert plan("pruned.json", "--model", "net.py:network", "--html", "pruned.json") == 1
    assert "must end in .html" in capsys.readouterr().err
    assert (files / "pruned.json").read_text() == before


@pytest.mark.parametrize("text", ["1,3,0,12", "0"])
def test_a_size_of_zero_is_refused(files, capsys, text):
    assert plan("sparse.json", "--model", "net.py:network", "--input", text) == 1
    assert f"--input {text}: sizes have to be at least 1" in capsys.readouterr().err
