"""Private names of torch stand in one place, and every one has a canary."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn

from compress_core import torch_internals as internals
from tests.conftest import ROOT
from tests.torch_internals.canaries import canary, covered


def test_failing_canary_says_what_torch_has_changed():
    @canary("is_view", breaks="this")
    def test():
        assert internals.is_view(torch.zeros(1))

    with pytest.raises(AssertionError, match=r"^torch .* changed what is_view stands for: this breaks; see there in"):
        test()


def test_every_name_has_a_canary():
    # Each canary is noted when its file is imported, and this file may be run alone.
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"{__package__}.{path.stem}")
    assert covered == set(internals.__all__)


def described() -> dict[str, str]:
    """Returns the docstring of each name in torch_internals; of names that are assigned, the string that follows."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for node in ast.parse(Path(internals.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            waiting.append(target.id)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.update(dict.fromkeys(waiting, node.value.value))
            waiting = []
    return found


def test_every_name_has_its_reason_the_public_way_and_what_happens_without():
    texts = described()
    for name in internals.__all__:
        assert re.findall(r"^ *(Why|Public way|Without it): \S", texts[name], re.MULTILINE) == [
            *("Why", "Public way", "Without it")
        ], name
    assert {name for name in texts if not name.startswith("_")} == set(internals.__all__)


SOURCES = [*sorted((ROOT / "compress_core").rglob("*.py")), *sorted((ROOT / "plugins").rglob("*.py"))]


# Files that may use private names of torch.
EXEMPT = {
    "compress_core/torch_internals.py": "the place for them",
}


# How every library reads and extends modules; see the docstring of torch_internals.
STORAGE = {"_parameters", "_buffers", "_modules"}


METHODS = {"_save_to_state_dict", "_load_from_state_dict", "_apply"}


OBJECTS = (torch.Tensor, nn.Parameter, torch.UntypedStorage, torch.ops.aten.add.Tensor, nn.LSTM(1, 1))


PRIVATE = {name for thing in OBJECTS for name in dir(thing) if re.match("_[^_]", name)} - METHODS


def is_private(name: str) -> bool:
    return any(re.match("_[^_]|_$", part) for part in name.split("."))


def private_names(source: str, accepted: set[str]) -> list[str]:
    """Returns the private names of torch in a source, each with its line."""
    tree = ast.parse(source)
    modules = {"torch"}  # names that stand for something of torch
    own = set(accepted)  # attributes that the file's own classes define
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            of_torch = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            modules |= {alias.asname for alias in of_torch if alias.asname}
            found += [(node.lineno, alias.name) for alias in of_torch if is_private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            modules |= {alias.asname or alias.name for alias in node.names}
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names if is_private(name)]
        elif isinstance(node, ast.ClassDef):
            own |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            of_torch = re.fullmatch(r"[\w.]+", name) and name.split(".")[0] in modules and is_private(node.attr)
            if of_torch or (node.attr in PRIVATE - own):
                found.append((node.lineno, name))
        elif isinstance(node, ast.Constant) and isinstance(text := node.value, str):
            of_torch = re.fullmatch(r"torch(\.\w+)+", text) and is_private(text)
            found += [(node.lineno, repr(text))] if of_torch or text in PRIVATE - own else []
    return [f"{line}: {name}" for line, name in sorted(found)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._subclasses import FakeTensor", "torch._subclasses.FakeTensor"),
        ("from torch.utils import _pytree as tree", "torch.utils._pytree"),
        ("from torch.nn.modules.conv import _ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("def f():\n  import torch.nn.functional as F\n  F._verify_batch_size(1)", "F._verify_batch_size"),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", "forward_ad._current_level"),
        ("torch._C.DisableTorchFunction()", "torch._C"),
        ("x.detach()._version", "x.detach()._version"),
        ("layer._flat_weights = []", "layer._flat_weights"),
        ("getattr(f, '_schema')", "'_schema'"),
        ("logging.getLogger('torch._subclasses.fake_tensor')", "'torch._subclasses.fake_tensor'"),
    ],
)
def test_private_names_are_found(source, name):
    assert name in [entry.partition(": ")[2] for entry in private_names(source, STORAGE)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch.overrides import TorchFunctionMode\ntorch.Tensor.__getitem__",
        "self._values = 1\nother._values",
        "class Mine:\n  def _version(self): ...\n\nmine._version()",
        "module._parameters['weight']",
        "super()._apply(f)",
        "'torch.nn.functional.relu'",
        "sys._getframe(1)",
    ],
)
def test_others_are_not_found(source):
    assert private_names(source, STORAGE) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_are_in_one_file(path):
    where = path.relative_to(ROOT).as_posix()
    if where in EXEMPT:
        pytest.skip(EXEMPT[where])
    found = private_names(path.read_text(), STORAGE if where.startswith("compress_core/") else set())
    assert not found, (
        f"{where}: private names of torch; give them a name and a reason in compress_core/torch_internals.py"
    )


# Rooms of the core that say how transforms are held, which may change on any day.
INSIDES = re.compile(r"compress_core\.transforms\.(chain|activation_forward|generated\w*|weight_chain|recomputation)\b")


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda path: path.stem)
def test_plugins_use_no_insides_of_transforms(path):
    assert not INSIDES.search(path.read_text()), "use what compress_core.transforms exports"
