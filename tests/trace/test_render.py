"""Traces for people: text, Graphviz graphs, pictures."""

import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import UsageError
from compress_core.trace import render, trace

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block())
        self.head = nn.Linear(2, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


@pytest.fixture(scope="module")
def traced():
    return trace(Network(), torch.ones(1, 2, 4, 4), training=True)


def edges(dot):
    """(label of the start, label of the end, label of the edge) of a graph, in order."""
    nodes = dict(re.findall(r'^ *(\w+) \[label="([^"]*)"', dot, re.MULTILINE))
    lines = re.findall(r'^ *(\w+) -> (\w+) \[label=" ?([^"]*)"\];$', dot, re.MULTILINE)
    return [(nodes[start].partition("\\n")[0], nodes[end].partition("\\n")[0], label) for start, end, label in lines]


def node_labels(dot):
    return re.findall(r'^ *n\d+ \[label="([^"]*)"', dot, re.MULTILINE)


# Text.


def test_text_of_calls(traced):
    evaluation, training, unreached = traced.to_text().split("\n\n")
    assert re.sub(r"%\d+", "%", evaluation).splitlines() == [
        "Forward in eval mode: 6 calls, 8 operators",
        "#  module         call         inputs -> outputs",
        "-" * 100,
        "0  blocks.0.conv  conv2d       %:[1x2x4x4] <input 0>, .weight:[2x2x3x3] -> %:[1x2x4x4]",
        "1  blocks.0.norm  batch_norm   %:[1x2x4x4], .running_mean:[2], .running_var:[2], .weight:[2], .bias:[2] -> %:[1x2x4x4]",
        "2  blocks.0       Tensor.add   %:[1x2x4x4] <input 0>, %:[1x2x4x4] -> %:[1x2x4x4]",
        "3  blocks.0       relu         %:[1x2x4x4] -> %:[1x2x4x4]",
        "4  (model)        Tensor.mean  %:[1x2x4x4] -> %:[1x2]",
        "5  head           linear       %:[1x2], .weight:[5x2], .bias:[5] -> %:[1x5] <output>",
    ]
    assert training.startswith("Forward in training mode: 7 calls")
    assert unreached == "Modules that no example has reached:\n  unused (Linear)"


def test_text_of_operators(traced):
    lines = traced.to_text("operators").split("\n\n")[0].splitlines()
    assert re.split(" {2,}", lines[1]) == ["#", "module", "operator", "inputs -> outputs"]
    assert [line.split()[1:3] for line in lines[3:]] == [
        ["blocks.0.conv", "convolution"],
        ["blocks.0.norm", "empty.memory_format"],
        ["blocks.0.norm", "native_batch_norm"],
        ["blocks.0", "add.Tensor"],
        ["blocks.0", "relu"],
        ["(model)", "mean.dim"],
        ["head", "t"],
        ["head", "addmm"],
    ]


def test_numbers_of_the_text_are_those_of_the_trace(traced):
    forward = traced.forwards[0]
    for level, steps in (("calls", forward.calls), ("operators", forward.operators)):
        for line, step in zip(traced.to_text(level).splitlines()[3:], steps, strict=False):
            assert line.split()[0] == str(step.index)
            for value in (v for _, v in step.outputs):
                assert f"%{value}:" in line


class Odd(nn.Module):
    def forward(self, x, *, mask):
        x = x.double()
        x.mul_(mask)
        return {"out": (x, mask)}


def test_text_tells_dtypes_keywords_paths_and_writes():
    text = trace(Odd(), {"x": torch.ones(2), "mask": torch.ones(2, dtype=torch.bool)}).to_text()
    assert [re.sub(r"%\d+", "%", line).split("  ")[-1].strip() for line in text.splitlines()[3:]] == [
        "%:[2] <input x> -> %:float64[2]",
        "%:float64[2], %:bool[2] <input mask, output out.1> -> %:float64[2] <output out.0> (in place)",
    ]


def test_text_of_several_examples_and_of_one_call():
    model = nn.Sequential(nn.BatchNorm1d(2))
    titles = [
        block.splitlines()[0]
        for block in trace(model, [torch.ones(1, 2), torch.ones(3, 2)], training=True).to_text().split("\n\n")
    ]
    assert titles == [
        "Forward in eval mode, example 1 of 2: 1 call, 2 operators",
        "Forward in eval mode, example 2 of 2: 1 call, 2 operators",
        "Forward in training mode, example 2 of 2: 2 calls, 3 operators",
        "Forward in training mode, example 1 of 2: the model fails in training mode on this example",
    ]


class OnValues(nn.Module):
    def forward(self, x):
        return x * x.sum().item()


def test_text_says_that_the_forward_needed_values():
    text = trace(OnValues(), torch.ones(2)).to_text()
    assert text.startswith(
        "Forward in eval mode: 2 calls, 3 operators, on real values because the forward needs them\n"
    )


def test_model_that_does_nothing():
    found = trace(nn.Identity(), torch.ones(2))
    assert found.to_text().startswith("Forward in eval mode: 0 calls, 0 operators\n")
    assert edges(found.to_dot()) == [("input 0", "output", "[2]")]


def test_unknown_level_and_forward(traced):
    for render_at in (traced.to_text, traced.to_dot, traced.to_svg):
        with pytest.raises(UsageError, match="there is no level 'modules'; levels are calls and operators"):
            render_at("modules")
    for number in (1, -1):
        with pytest.raises(UsageError, match=f"there is no forward {number}: the trace has 1, counted from 0"):
            traced.to_dot(forward=number)


# Graphs.


def test_edges_are_tensors(traced):
    assert edges(traced.to_dot()) == [
        ("input 0", "conv: conv2d", "[1x2x4x4]"),
        ("conv: conv2d", "norm: batch_norm", "[1x2x4x4]"),
        ("input 0", "Tensor.add", "[1x2x4x4]"),
        ("norm: batch_norm", "Tensor.add", "[1x2x4x4]"),
        ("Tensor.add", "relu", "[1x2x4x4]"),
        ("relu", "Tensor.mean", "[1x2x4x4]"),
        ("Tensor.mean", "head: linear", "[1x2]"),
        ("head: linear", "output", "[1x5]"),
    ]


def test_modules_are_boxes_around_what_they_call(traced):
    lines = [line.strip() for line in traced.to_dot("operators").splitlines()]
    assert [line for line in lines if line.startswith(("subgraph", "label="))] == [
        'subgraph "cluster blocks" {',
        'label="blocks: Sequential";',
        'subgraph "cluster blocks.0" {',
        'label="0: Block";',
        'subgraph "cluster head" {',
        'label="head: Linear";',
    ]
    # The transposed weight is drawn; what batch norm makes for nobody is not.
    assert node_labels(traced.to_dot("operators")) == [
        *["conv: convolution", "norm: native_batch_norm", "add.Tensor", "relu", "mean.dim", "t", "addmm"]
    ]


def test_write_in_place_is_a_step_on_the_way():
    class Writes(nn.Module):
        def forward(self, x):
            y = torch.zeros(2, 4)
            y[0] = x
            y.add_(1)
            return F.dropout(y, training=self.training) * 2

    assert edges(trace(Writes(), torch.ones(4)).to_dot()) == [
        ("zeros", "Tensor.__setitem__", "[2x4]"),
        ("input 0", "Tensor.__setitem__", "[4]"),
        ("Tensor.__setitem__", "Tensor.add_", "[2x4]"),
        ("Tensor.add_", "dropout", "[2x4]"),
        ("dropout", "Tensor.mul", "[2x4]"),  # in eval mode dropout hands on what it is given
        ("Tensor.mul", "output", "[2x4]"),
    ]


def test_module_called_twice_has_one_box():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    dot = trace(Twice(), torch.ones(2, 4)).to_dot()
    assert dot.count("subgraph") == 1
    assert [edge[:2] for edge in edges(dot)] == [
        ("input 0", "linear"),
        ("linear", "Tensor.relu"),
        ("Tensor.relu", "linear"),
        ("linear", "output"),
    ]


ODD_NAMES = ['a "quoted" name', "back\\slash \\N", "<b>&lt;&amp; &", "{|}", "line\nbreak", "ümlaut", "node"]


def odd_names():
    names = {name: nn.Sequential(nn.ReLU(), nn.Tanh()) for name in ODD_NAMES}
    model = nn.Sequential()
    for name, module in names.items():
        model.add_module(name, module)
    return trace(model, torch.ones(2))


def texts_of(svg):
    root = ElementTree.fromstring(svg)
    return {"".join(node.itertext()).replace("\xa0", " ") for node in root.iter("{http://www.w3.org/2000/svg}text")}


@needs_graphviz
def test_odd_names_are_drawn_as_they_are():
    shown = texts_of(odd_names().to_svg())
    for name in ODD_NAMES:
        lines = f"{name}: Sequential".split("\n")
        assert shown >= set(lines), name


def test_quoted():
    assert render.quoted('say "a\\b"\r\n&lt;') == '"say \\"a\\\\b\\"\\n&amp;lt;"'


# Pictures.


@needs_graphviz
@pytest.mark.parametrize("level", ["calls", "operators"])
def test_picture_shows_every_node_and_edge(traced, level):
    svg = traced.to_svg(level)
    dot = traced.to_dot(level)
    shown = texts_of(svg)
    assert shown >= {*node_labels(dot), "input 0", "output", "blocks: Sequential", "0: Block"}
    groups = [g.get("class") for g in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")]
    assert groups.count("node") == len(node_labels(dot)) + 2
    assert groups.count("edge") == len(edges(dot))


def test_picture_without_graphviz_says_what_to_install(traced, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(UsageError, match=r"'dot', which is not on the PATH: install Graphviz .* or write a \.dot file"):
        traced.to_svg()


def program(tmp_path, monkeypatch, script):
    file = tmp_path / "dot"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(file))


def test_graphviz_that_fails(traced, tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "cat > /dev/null; echo 'no layout engine' >&2; exit 3")
    with pytest.raises(UsageError, match="Graphviz fails: no layout engine"):
        traced.to_svg()
    program(tmp_path, monkeypatch, "cat > /dev/null; exit 3")
    with pytest.raises(UsageError, match="Graphviz fails: exit status 3"):
        traced.to_svg()


def test_graphviz_that_does_not_finish(traced, tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr(render, "_PATIENCE", 0.2)
    with pytest.raises(UsageError, match=r"did not finish within 0\.2 s"):
        traced.to_svg()


def test_graphviz_that_cannot_be_run(traced, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path))  # a folder
    with pytest.raises(UsageError, match="Graphviz fails: "):
        traced.to_svg()


@needs_graphviz
def test_graph_is_what_graphviz_reads(traced):
    done = subprocess.run(["dot", "-Tplain"], input=traced.to_dot(), capture_output=True, text=True, check=True)
    assert done.stderr == ""
