"""`compress-core trace`: from a name on the command line to a text, a graph or a picture."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from compress_core.__main__ import main
from compress_core.trace import trace
from tests.conftest import ROOT

NETWORK = """
import sys
from dataclasses import dataclass

import torch
from torch import nn

print("the file is imported")


@dataclass
class Sizes:
    inputs: int = 4


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(Sizes().inputs, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x, scale=None):
        print("the forward runs")
        x = self.layer(x)
        return x if scale is None else x * scale


def network():
    print("the model is made")
    return Network()


def needs(size):
    return Network()


def breaks():
    raise RuntimeError("no weights\\nanywhere")


def ends():
    sys.exit("wrong usage")


def embedding():
    return nn.Embedding(9, 2)


instance = Network()
number = 3
text = lambda: "text"


class namespace:
    model = instance
"""

TEXT_OF_CALLS = """\
Forward in eval mode: 1 call, 2 operators
#  module  call    inputs -> outputs
------------------------------------------------------------------------------------
0  layer   linear  %0:[2x4] <input 0>, .weight:[3x4], .bias:[3] -> %4:[2x3] <output>

Modules that no example has reached:
  unused (Linear)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A directory with a module of a name that nothing else has, from which it can be imported."""
    (tmp_path / "traced_network.py").write_text(NETWORK)
    (tmp_path / "beside.py").write_text("from traced_network import network\n")
    (tmp_path / "broken_network.py").write_text("import no_such_module\n")
    (tmp_path / "syntax_network.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == before[1]
    for name in set(sys.modules) - before[0]:
        if "network" in name or "beside" in name:
            del sys.modules[name]


def shown(capsys, *arguments):
    assert main(["trace", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line on stderr; what the model's own code prints stands before it."""
    assert main(["trace", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    own = ("the file is imported", "the model is made", "the forward runs")
    (line,) = [line for line in captured.err.splitlines() if line not in own]
    assert line.startswith("compress-core trace: ")
    return line.removeprefix("compress-core trace: ")


@pytest.mark.parametrize(
    "name",
    [
        "traced_network:network",
        "traced_network:Network",
        "traced_network:instance",
        "traced_network:namespace.model",
        "traced_network.py:network",
        "./traced_network.py:instance",
        "beside.py:network",
    ],
)
def test_text_is_printed(name, capsys):
    assert shown(capsys, name, "--input", "2,4") == TEXT_OF_CALLS


def test_file_elsewhere_sees_the_modules_beside_it(project, capsys, monkeypatch):
    monkeypatch.chdir("/")
    assert shown(capsys, f"{project}/beside.py:network", "--input", "2,4").startswith("Forward in eval mode: 1 call")


def test_file_named_like_a_module_in_use_does_not_take_its_place(project, capsys):
    shutil.copy(project / "traced_network.py", project / "torch.py")
    assert "linear" in shown(capsys, "torch.py:network", "--input", "2,4")
    assert sys.modules["torch"] is torch


def test_output_of_the_models_own_code_is_not_part_of_the_trace(capsys):
    main(["trace", "traced_network:network", "--input", "2,4"])
    captured = capsys.readouterr()
    assert captured.out == TEXT_OF_CALLS
    assert captured.err == "the file is imported\nthe model is made\nthe forward runs\n"


def test_level(capsys):
    calls = shown(capsys, "traced_network:network", "--input", "2,4", "--level", "calls")
    operators = shown(capsys, "traced_network:network", "--input", "2,4", "--level", "operators")
    assert calls == shown(capsys, "traced_network:network", "--input", "2,4")
    assert [line.split()[2] for line in operators.splitlines()[3:5]] == ["t", "addmm"]


def test_several_inputs_by_position_and_by_name(capsys):
    text = shown(capsys, "traced_network:network", "--input", "2,4", "--input", "scale=3:half")
    assert "float16[3] <input scale>" in text
    assert "%0:[2x4] <input 0>" in text
    assert "<input 1>" in shown(capsys, "traced_network:network", "--input", "2,4", "--input", "3")
    assert "int64[7] <input 0>" in shown(capsys, "traced_network:embedding", "--input", "7:long")


def test_inputs_of_a_config(project, capsys):
    config = project / "config.json"
    config.write_text('{"input_info": [{"sample_size": [2, 4]}, {"sample_size": [3], "keyword": "scale"}]}')
    text = shown(capsys, "traced_network:network", "--config", str(config))
    assert "%0:[2x4] <input 0>" in text
    assert "[3] <input scale>" in text


def test_files_are_written(project, capsys):
    sys.path.insert(0, str(project))
    try:
        from traced_network import network
    finally:
        sys.path.remove(str(project))
    found = trace(network(), torch.ones(2, 4))
    capsys.readouterr()
    for level in ("calls", "operators"):
        options = ["traced_network:network", "--input", "2,4", "--level", level, "-o"]
        for suffix in ("txt", "dot"):
            out = shown(capsys, *options, f"trace.{suffix}")
            assert out == f"trace.{suffix}: 1 call, 2 operators; modules not reached: unused\n"
        assert (project / "trace.txt").read_text() == found.to_text(level) + "\n"
        assert (project / "trace.dot").read_text() == found.to_dot(level)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_picture_is_written(project, capsys):
    out = shown(capsys, "traced_network:network", "--input", "2,4", "--output", "picture.SVG")
    assert out.startswith("picture.SVG: ")
    assert "layer: linear" in (project / "picture.SVG").read_text()


def test_picture_without_graphviz(project, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    line = refused(capsys, "traced_network:network", "--input", "2,4", "-o", "trace.svg")
    assert line.startswith("a picture needs the program 'dot', which is not on the PATH: install Graphviz")
    assert not (project / "trace.svg").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "traced_network",
            "'traced_network' does not name a model: write package.module:attribute or path/to/file.py:att",
        ),
        ("traced_network:", "'traced_network:' does not name a model"),
        (":network", "':network' does not name a model"),
        (
            "no_such_network:net",
            "importing no_such_network fails: ModuleNotFoundError: No module named 'no_such_network'",
        ),
        ("no_such_file.py:net", "there is no file no_such_file.py"),
        ("broken_network:net", "importing broken_network fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("syntax_network.py:net", "importing syntax_network.py fails: SyntaxError: "),
        ("traced_network:nothing", "traced_network:nothing: the module traced_network has no attribute 'nothing'"),
        (
            "traced_network.py:nothing",
            "traced_network.py:nothing: the module traced_network has no attribute 'nothing'",
        ),
        (
            "traced_network:Network.nothing",
            "traced_network:Network.nothing: the class Network has no attribute 'nothing'",
        ),
        ("traced_network:number", "traced_network:number is an object of type int; it has to be a torch.nn.Module"),
        (
            "traced_network:text",
            "traced_network:text returns an object of type str; it has to return a torch.nn.Module",
        ),
        ("traced_network:needs", "needs() fails: TypeError: needs() missing 1 required positional argument: 'size'"),
        ("traced_network:breaks", "breaks() fails: RuntimeError: no weights anywhere"),
        ("traced_network:ends", "ends() fails: SystemExit: wrong usage"),
    ],
)
def test_name_that_is_no_model(name, message, capsys):
    assert refused(capsys, name, "--input", "2,4").startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "--input : is no shape; write sizes, such as 1,3,32,32"),
        ("1,x", "--input 1,x: is no shape"),
        ("9" * 5000, "--input 9999999"),
        ("-1,4", "--input -1,4: is no shape"),
        ("2,4,", "--input 2,4,: is no shape"),
        ("2 4", "--input 2 4: is no shape"),
        ("=2,4", "--input =2,4: is no shape"),
        ("2,4:", "--input 2,4:: is no shape"),
        ("2,4:flot", "--input.0.type: 'flot' is not the name of a torch dtype, such as float or long"),
        ("2,4:qint8", "--input.0: cannot make a qint8 tensor"),
        ("999999999999,999999999999", "--input.0: cannot make a float tensor of the shape"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_input_that_is_no_shape(given, message, capsys):
    assert refused(capsys, "traced_network:network", f"--input={given}").startswith(message)


def test_argument_given_twice(capsys):
    line = refused(capsys, "traced_network:network", "--input", "x=2,4", "--input", "x=2,4")
    assert line == "--input.1.keyword: the argument 'x' is described twice"


def test_missing_input(project, capsys):
    assert refused(capsys, "traced_network:network").startswith("there is no example input; give --input, such as")
    config = project / "config.json"
    for content in ("{}", '{"input_info": {"type": "long"}}'):
        config.write_text(content)
        line = refused(capsys, "traced_network:network", "--config", str(config))
        assert line.startswith(f"{config}: has no example input; add input_info, such as")


def test_config_that_is_wrong(project, capsys):
    config = project / "config.json"
    config.write_text('{"input_info": [{"sample_size": "x"}, {"fillr": "ones"}]}')
    line = refused(capsys, "traced_network:network", "--config", str(config))
    assert "input_info.0.sample_size" in line
    assert "input_info.1.fillr" in line
    assert "cannot read" in refused(capsys, "traced_network:network", "--config", "missing.json")


def test_config_and_input_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trace", "traced_network:network", "--input", "2,4", "--config", "config.json"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_model_that_does_not_trace(capsys):
    line = refused(capsys, "traced_network:network", "--input", "2,5")
    assert line.startswith("Network cannot be traced: its forward fails in 'layer' (Linear) on --input: mat1 and mat2")


@pytest.mark.parametrize("output", ["trace.png", "trace", "trace.svg.gz"])
def test_unknown_kind_of_file_is_refused_before_the_model_is_made(output, capsys):
    line = refused(capsys, "no_such_network:net", "--input", "2,4", "-o", output)
    assert line == f"{output}: cannot write this; the name has to end in .svg, .dot, .txt"


def test_file_that_cannot_be_written(project, capsys):
    (project / "folder.txt").mkdir()
    for output, reason in (("no/such/folder/trace.txt", "No such file or directory"), ("folder.txt", "Is a directory")):
        line = refused(capsys, "traced_network:network", "--input", "2,4", "-o", output)
        assert line == f"cannot write {output}: {reason}"


def test_documented_output_is_what_is_printed(project, capsys, monkeypatch):
    document = (ROOT / "docs" / "trace.md").read_text()
    network, in_python = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (project / "network.py").write_text(network)
    commands = re.findall(r"```\n\$ compress-core trace (.*?)\n(.*?)```", document, re.DOTALL)
    assert len(commands) == 2
    for arguments, output in commands:
        assert shown(capsys, *arguments.split()) == output
    monkeypatch.syspath_prepend(str(project))
    exec(in_python, {})
    printed = capsys.readouterr().out
    assert printed.startswith(commands[0][1].split("\n\n")[0])
    assert printed.endswith(" []\n")  # in training mode everything is reached
    monkeypatch.undo()


def test_reader_that_stops_reading(project):
    # More text than a pipe holds, so that the writer is still writing when the reader is gone.
    (project / "long_network.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "model = nn.Sequential(OrderedDict((5000 * 'name' + str(i), nn.ReLU()) for i in range(10)))\n"
    )
    command = (
        f"{sys.executable} -m compress_core trace long_network:model --input 2,4 | head -1; exit ${{PIPESTATUS[0]}}"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "Forward in eval mode: 10 calls, 10 operators\n"
    assert (done.returncode, done.stderr) == (0, "")
