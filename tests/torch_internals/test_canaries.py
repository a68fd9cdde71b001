"""Canaries: what torch's private names do, one by one; and that no other file uses a private name of torch."""

import ast
import copy
import functools
import logging
import pickle
import re
import shutil
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.checkpoint import checkpoint

from compress_core import torch_internals as internals
from tests.conftest import ROOT

covered: set[str] = set()


def canary(*names: str, breaks: str):
    """Makes a test fail with a sentence that says what has happened, whatever it was."""
    covered.update(names)

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except pytest.skip.Exception:
                raise
            except BaseException as error:
                raise AssertionError(
                    f"torch {torch.__version__} changed what {', '.join(names)} stands for: {breaks} breaks; see there "
                    "in compress_core/torch_internals.py"
                ) from error

        return run

    return decorate


class Functions(TorchFunctionMode):
    """Writes down which functions are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(resolve_name(func))
        return func(*args, **(kwargs or {}))


class Operators(internals.TorchDispatchMode):
    """Writes down which operators are run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@canary("MODULE_CALL", "frames_dynamo_traces", breaks="telling what a user's hook calls from what the model calls")
@pytest.mark.parametrize("compiled", [False, True])
def test_calls_of_hooks_are_told_from_calls_of_the_forward(compiled):
    from compress_core.transforms import CallOutput, CallPattern, add_activation_transform

    class Doubled(torch.nn.Module):
        def forward(self, x):
            return x * 2

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Identity()

        def forward(self, x):
            return torch.relu(self.inner(x))

    model, seen = Net(), []
    add_activation_transform(
        model, CallOutput("", "torch.relu", CallPattern(0, (0,)), ()), Doubled(), stage=30, key="k"
    )
    model.inner.register_forward_hook(lambda module, args, output: seen.append(torch.relu(output)))
    called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert called(torch.tensor(3.0)) == 6  # the first relu of the forward, not that of the hook
    assert seen[0] == 3


@canary("remove_forward_hooks", breaks="stripping models whose loss needs the batch")
def test_forward_hooks_of_a_class_can_be_taken_away():
    class Hook:
        def __call__(self, module, args, kwargs, output):
            raise AssertionError("called")

    model = torch.nn.Linear(1, 1)
    model.register_forward_hook(Hook(), with_kwargs=True)
    other = model.register_forward_hook(lambda module, args, output: output * 0)
    internals.remove_forward_hooks(model, Hook)
    assert model(torch.ones(1)) == 0
    other.remove()
    assert not internals.has_hooks(model)


# What surrounds the code that is running.


@canary("is_plain_execution", breaks="telling where weights may be kept and kernels compiled")
def test_execution_is_plain_unless_something_traces_wraps_or_differentiates():
    seen = {}

    def look(x, name):
        seen[name] = internals.is_plain_execution()
        return x * 2

    x = torch.ones(2)
    look(x, "plain")
    look(x.clone().requires_grad_(), "autograd")
    with torch.no_grad():
        look(x, "no_grad")
    with Operators():
        look(x, "dispatch mode")
    torch.func.vmap(lambda x: look(x, "vmap"))(x)
    torch.func.grad(lambda x: look(x, "grad").sum())(x)
    torch.jit.trace(lambda x: look(x, "jit"), x, check_trace=False)
    with forward_ad.dual_level():
        look(x, "forward mode")
    look(x, "afterwards")
    plain = {"plain", "autograd", "no_grad", "afterwards"}
    assert seen == {name: name in plain for name in seen}
    assert len(seen) == 9


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_functorch", "_get_tracing_state"])
def test_nothing_is_plain_where_torch_cannot_be_asked(monkeypatch, name):
    assert internals.is_plain_execution()
    monkeypatch.delattr(torch._C, name)
    assert not internals.is_plain_execution()


@canary("is_plain_execution", breaks="the count of dispatch modes, and with it the question for plain execution,")
def test_each_dispatch_mode_counts():
    counts = [torch._C._len_torch_dispatch_stack()]
    with Operators():
        counts.append(torch._C._len_torch_dispatch_stack())
        with Operators():
            counts.append(torch._C._len_torch_dispatch_stack())
    counts.append(torch._C._len_torch_dispatch_stack())
    assert counts == [0, 1, 2, 0]


@canary("is_forward_mode", breaks="the straight-through derivative of quantizers in forward mode")
def test_forward_mode_is_known():
    assert not internals.is_forward_mode()
    with forward_ad.dual_level():
        assert internals.is_forward_mode()
    assert not internals.is_forward_mode()
    torch.func.jvp(lambda x: x if internals.is_forward_mode() else 1 / 0, (torch.ones(1),), (torch.ones(1),))


@canary("TorchDispatchMode", breaks="the lower level of traces")
def test_dispatch_mode_sees_operators_inside_of_functions():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with Operators() as operators:
        torch.nn.functional.linear(x, weight)
    assert operators.seen == ["aten.t.default", "aten.mm.default"]


@canary(
    *("function_mode_count", "function_mode_at", "pop_function_mode", "push_function_mode"),
    breaks="hiding the calls that transforms make from the modes that count the model's calls",
)
def test_stack_of_function_modes_can_be_changed():
    x = torch.ones(2)
    assert internals.function_mode_count() == 0
    with Functions() as outer, Functions() as inner:
        assert internals.function_mode_count() == 2
        assert (internals.function_mode_at(0), internals.function_mode_at(1)) == (outer, inner)
        assert internals.pop_function_mode() is inner
        assert internals.function_mode_count() == 1
        torch.sigmoid(x)
        internals.push_function_mode(inner)
        torch.tanh(x)
    assert internals.function_mode_count() == 0
    assert inner.seen == ["torch.tanh"]
    assert outer.seen == ["torch.sigmoid", "torch.tanh"]


@canary("TorchFunctionDisabled", breaks="keeping our own questions out of traces")
def test_neither_modes_nor_subclasses_see_what_is_disabled():
    asked = []

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Subclass)
    with Functions() as mode, internals.TorchFunctionDisabled():
        assert x.shape == (2,)
        torch.sigmoid(x)
    assert not mode.seen
    assert not asked
    with Functions() as mode:
        torch.sigmoid(x)
    assert mode.seen == ["torch.sigmoid"]
    assert asked == [torch.sigmoid]


# Fake tensors, and structures of tensors.


@canary("FakeTensor", "FakeTensorMode", breaks="tracing without computing")
def test_fake_tensors_have_shapes_and_share_memory_but_have_no_values():
    layer = nn.Linear(3, 4)
    mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = mode.from_tensor(torch.ones(10**6, 3))
        y = layer(x)
        new = torch.zeros(2)
    assert all(type(tensor) is internals.FakeTensor and tensor.fake_mode is mode for tensor in (x, y, new))
    assert y.shape == (10**6, 4)
    assert (y.dtype, y.device) == (torch.float32, torch.device("cpu"))
    with pytest.raises(Exception, match="_local_scalar_dense"), mode:
        y.sum().item()
    # As long as it lives, a parameter is always the same fake tensor, whose memory its views share.
    weight, bias = mode.from_tensor(layer.weight), mode.from_tensor(layer.bias)
    identity = internals.storage_identity(weight)
    assert mode.from_tensor(layer.weight) is weight
    with mode:
        assert internals.storage_identity(layer.weight.view(-1)) == identity
    assert internals.storage_identity(bias) != identity


@canary("FAKE_TENSOR_LOGGER", breaks="keeping torch's stack traces out of logs")
def test_fake_tensors_log_what_fails_where_we_think(caplog):
    x = torch.ones(2, 3)
    with caplog.at_level(logging.ERROR, internals.FAKE_TENSOR_LOGGER):
        logging.getLogger(internals.FAKE_TENSOR_LOGGER).addHandler(caplog.handler)
        try:
            with pytest.raises(RuntimeError), internals.FakeTensorMode(allow_non_fake_inputs=True):
                torch.mm(x, x)
        finally:
            logging.getLogger(internals.FAKE_TENSOR_LOGGER).removeHandler(caplog.handler)
    assert {record.name for record in caplog.records} == {internals.FAKE_TENSOR_LOGGER}


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


@canary("tree_map", "tree_leaves", "tree_flatten_with_path", breaks="finding tensors in nested arguments and outputs")
def test_trees_are_walked_in_order_and_with_the_way_to_each_leaf():
    point = namedtuple("point", "x y")
    tree = ({"b": [1, 2], "a": (3,)}, point(4, None), OrderedDict(z=5))
    assert [leaf for leaf in internals.tree_leaves(tree) if leaf is not None] == [1, 2, 3, 4, 5]
    doubled = internals.tree_map(lambda leaf: leaf and 2 * leaf, tree)
    assert doubled == ({"b": [2, 4], "a": (6,)}, point(8, None), OrderedDict(z=10))
    assert [type(part) for part in doubled] == [dict, point, OrderedDict]
    found, _ = internals.tree_flatten_with_path(tree)
    ways = ["".join(map(str, path)) for path, leaf in found if leaf is not None]
    assert ways == ["[0]['b'][0]", "[0]['b'][1]", "[0]['a'][0]", "[1].x", "[2]['z']"]
    assert internals.tree_leaves(Pair(1, 2))[0].first == 1  # a class that nobody has registered is a leaf


# Tensors and operators.


@canary("version_of", breaks="noticing that a weight was written to")
def test_versions_count_writes():
    x = torch.zeros(3)
    before = internals.version_of(x)
    x.sum(), x + 1
    assert internals.version_of(x) == before
    x.add_(1)
    x[0].mul_(2)  # through a view
    assert internals.version_of(x) == before + 2
    assert internals.version_of(x.detach()) == before + 2
    x.data.add_(1)  # why values are compared as well
    assert internals.version_of(x) == before + 2
    with torch.inference_mode():
        y = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        internals.version_of(y)


@canary("is_view", breaks="telling whose memory may be written to")
def test_views_are_known():
    x = torch.zeros(3, requires_grad=True)
    y = x * 1
    assert [internals.is_view(t) for t in (x, y, y.clone())] == [False] * 3
    assert [internals.is_view(t) for t in (y[0], y.view(3), y.expand(2, 3), y.t())] == [True] * 4
    with torch.no_grad():
        assert internals.is_view(x.view(-1))


@canary("storage_identity", breaks="telling which tensors share memory")
def test_storages_are_known():
    x, empty, other = torch.zeros(3), torch.zeros(0), torch.zeros(0)
    identity = internals.storage_identity
    assert isinstance(identity(x), int)
    assert identity(x) == identity(x[1:]) == identity(x.detach()) == identity(x.data)
    assert identity(x) != identity(x.clone())
    assert identity(empty) != identity(other)
    assert empty.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == 0  # the public way
    with pytest.raises((RuntimeError, NotImplementedError)):
        identity(x.to_sparse())


@canary("has_gradient_hooks", breaks="shrinking parameters whose gradient somebody has hooked")
def test_hooks_of_gradients_are_known():
    parameter = nn.Parameter(torch.zeros(2))
    assert not internals.has_gradient_hooks(parameter)
    handle = parameter.register_hook(lambda gradient: None)
    assert internals.has_gradient_hooks(parameter)
    handle.remove()
    assert not internals.has_gradient_hooks(parameter)


@canary("schema_of", breaks="seeing in a trace what operators write to")
def test_schemas_say_what_is_written_to():
    def written(function):
        arguments = internals.schema_of(function).arguments
        return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

    aten = torch.ops.aten
    assert written(aten.add_.Tensor) == ["self"]
    assert written(aten.add.out) == ["out"]
    assert written(aten.add.Tensor) == written(aten.view.default) == []
    assert "dim" in str(internals.schema_of(aten.sum.dim_IntList))
    assert "dim" not in str(internals.schema_of(aten.sum.default))
    assert internals.schema_of(torch.relu) is None


# What is kept for the backward pass.


@canary("may_set_saved_tensors_hooks", breaks="leaving checkpointing and offloading alone")
def test_saved_tensors_hooks_of_others_are_known():
    seen = {"plain": internals.may_set_saved_tensors_hooks()}

    def look(x):
        seen["checkpoint"] = internals.may_set_saved_tensors_hooks()
        return x * 2

    with saved_tensors_hooks(lambda x: x, lambda x: x):
        seen["hooks"] = internals.may_set_saved_tensors_hooks()
    with save_on_cpu():
        seen["save_on_cpu"] = internals.may_set_saved_tensors_hooks()
    with disable_saved_tensors_hooks("none here"):
        seen["disabled"] = internals.may_set_saved_tensors_hooks()
    checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False)
    seen["afterwards"] = internals.may_set_saved_tensors_hooks()
    assert seen == {name: name in {"plain", "afterwards"} for name in seen}
    assert len(seen) == 6


def test_no_hooks_are_set_where_torch_cannot_be_asked(monkeypatch):
    assert internals.may_set_saved_tensors_hooks()
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert not internals.may_set_saved_tensors_hooks()


@canary("is_any_autocast_enabled", breaks="telling where layers keep a copy of their weight")
def test_autocast_is_known():
    assert not internals.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.is_any_autocast_enabled()
        with torch.autocast("cpu", enabled=False):
            assert not internals.is_any_autocast_enabled()
    assert not internals.is_any_autocast_enabled()


# Layers.


@canary("AnyBatchNorm", "AnyNorm", "AnyConv", "AnyConvTranspose", breaks="finding the layers of a kind")
def test_layers_derive_from_the_bases_of_their_kind():
    def of_kind(base):
        named = {name: cls for name, cls in vars(nn).items() if isinstance(cls, type)}
        return {name for name, cls in named.items() if issubclass(cls, base) and not name.startswith("Lazy")}

    batch = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"}
    transposed = {f"ConvTranspose{dims}d" for dims in (1, 2, 3)}
    assert of_kind(internals.AnyBatchNorm) == batch
    assert of_kind(internals.AnyNorm) == batch | {f"InstanceNorm{dims}d" for dims in (1, 2, 3)}
    assert of_kind(internals.AnyConvTranspose) == transposed
    assert of_kind(internals.AnyConv) == transposed | {f"Conv{dims}d" for dims in (1, 2, 3)}


# How each kind of hook is registered, and what may be done with a module that has one.
HOOKS = {
    "_forward_hooks": (lambda m: m.register_forward_hook(lambda *_: None), True),
    "_forward_pre_hooks": (lambda m: m.register_forward_pre_hook(lambda *_: None), True),
    "_backward_hooks": (lambda m: m.register_full_backward_hook(lambda *_: None), True),
    "_backward_pre_hooks": (lambda m: m.register_full_backward_pre_hook(lambda *_: None), True),
    "_state_dict_hooks": (lambda m: m.register_state_dict_post_hook(lambda *_: None), False),
    "_state_dict_pre_hooks": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), False),
    "_load_state_dict_pre_hooks": (lambda m: m.register_load_state_dict_pre_hook(lambda *_: None), False),
    "_load_state_dict_post_hooks": (lambda m: m.register_load_state_dict_post_hook(lambda *_: None), False),
}


@canary("HOOK_ATTRIBUTES", breaks="comparing the hooks of a model that was rolled back")
def test_all_kinds_of_hooks_are_known():
    stores = {name for name, value in vars(nn.Module()).items() if name.endswith("_hooks") and isinstance(value, dict)}
    assert set(internals.HOOK_ATTRIBUTES) == stores == set(HOOKS)


@pytest.mark.parametrize("attribute", HOOKS)
@canary("HOOK_ATTRIBUTES", "has_hooks", breaks="telling what may be called without its hooks")
def test_hooks_are_found_where_they_are_registered(attribute):
    register, expected = HOOKS[attribute]
    module = nn.Linear(1, 1)
    assert not internals.has_hooks(module)
    handle = register(module)
    assert [name for name in internals.HOOK_ATTRIBUTES if vars(module)[name]] == [attribute]
    assert internals.has_hooks(module) == expected
    handle.remove()
    assert not internals.has_hooks(module)


class CountingLinear(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def do_nothing(module, args):
    raise RuntimeError("the module that holds the hook is never called")


@canary("add_own_forward_pre_hook", breaks="keeping transformer layers from bypassing their children")
def test_hook_anywhere_below_keeps_a_layer_from_its_fused_kernel(monkeypatch):
    monkeypatch.setattr(CountingLinear, "calls", 0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.linear1.__class__ = CountingLinear
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        fused = layer(x)
        assert CountingLinear.calls == 0
        layer.holder = nn.Module()
        internals.add_own_forward_pre_hook(layer.holder, do_nothing)
        torch.testing.assert_close(layer(x), fused)
    assert CountingLinear.calls == 1
    # The same for every module, so that equal modules have equal pickles.
    twin = nn.Module()
    internals.add_own_forward_pre_hook(twin, do_nothing)
    assert pickle.dumps(twin) == pickle.dumps(layer.holder.train())


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
@canary("recurrent_overrides", breaks="transforming the weights of recurrent layers")
def test_recurrent_layer_computes_with_weights_that_are_read_by_name(cls):
    reads = []

    def doubled(self):
        reads.append(1)
        return self._parameters["weight_hh_l0"] * 2

    layer, x = cls(3, 4, batch_first=True), torch.randn(2, 5, 3)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight_hh_l0.mul_(2)
    namespace = {**internals.recurrent_overrides(), "weight_hh_l0": property(doubled)}
    layer.__class__ = type(cls.__name__, (cls,), namespace)
    assert torch.equal(layer(x)[0], expected(x)[0])
    few = len(reads)
    # What is read is new each time: torch would rebuild its list before every forward.
    rebuilt = copy.deepcopy(layer)
    reads.clear()
    rebuilt.__class__ = type(cls.__name__, (cls,), {k: v for k, v in namespace.items() if k != "_weights_have_changed"})
    rebuilt(x)
    assert few < len(reads)
    # Moves, copies and pickles rebuild the list as well, and must not store what was computed.
    moved = copy.deepcopy(layer).double()
    assert torch.allclose(moved(x.double())[0], expected.double()(x.double())[0])
    moved.__class__ = cls
    moved.flatten_parameters()
    assert all(any(weight is p for p in moved.parameters()) for weight in vars(moved)["_flat_weights"])


@pytest.mark.parametrize("assign", [True, False])
@canary("ASSIGN_ENTRY", breaks="load_state_dict(assign=True) for activation transforms")
def test_modules_are_told_to_assign(assign):
    told = []

    class Told(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            told.append(local_metadata.get(internals.ASSIGN_ENTRY, False))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model, state = nn.Sequential(Told(2, 2)), {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    model.load_state_dict(state, assign=assign)
    assert told == [assign]
    assert (model[0].weight.data_ptr() == state["0.weight"].data_ptr()) == assign


def test_accepted_methods_of_modules_are_called_for_each_part():
    """The three methods that `torch_internals` names as accepted: called for children, with these arguments."""
    called = []

    class Part(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            called.append(("save", prefix))
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict, prefix, *args):
            called.append(("load", prefix))
            super()._load_from_state_dict(state_dict, prefix, *args)

        def _apply(self, fn, recurse=True):
            called.append(("apply", recurse))
            return super()._apply(fn, recurse)

    model = nn.Sequential(Part(1, 1))
    model.load_state_dict(model.state_dict())
    model.half()
    assert called == [("save", "0."), ("load", "0."), ("apply", True)]
    assert model[0].weight.dtype == torch.float16


# The compiler.


@pytest.fixture
def graphs():
    """The graphs that a backend for `torch.compile` was given, and the backend."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    yield made, backend
    torch._dynamo.reset()


@canary("dynamo_callback", breaks="keeping dynamo from compiling parts of a model that has fallen back to eager")
def test_dynamo_is_known_to_be_watching(graphs):
    seen = []

    @torch.compiler.disable(recursive=False)
    def look():
        seen.append(internals.dynamo_callback() not in (None, False))

    @torch.compiler.disable
    def look_aside():
        seen.append(internals.dynamo_callback() not in (None, False))

    def forward(x):
        y = x + 1
        look()
        look_aside()
        return y * 2

    assert torch.equal(torch.compile(forward, backend=graphs[1])(torch.ones(1)), torch.full((1,), 4.0))
    look()
    assert seen == [True, False, False]


@canary("skip_frame", breaks="leaving models whose functions dynamo hides to eager execution")
def test_frame_can_be_skipped_from_within(graphs):
    made, backend = graphs

    def check(hidden):
        if hidden and torch.compiler.is_dynamo_compiling():
            internals.skip_frame("a canary")

    def forward(x, hidden):
        try:
            y = x + 1
            check(hidden)
        except ValueError:
            raise
        return y * 2

    compiled = torch.compile(forward, backend=backend)
    assert torch.equal(compiled(torch.ones(1), True), torch.full((1,), 4.0))
    assert not made
    torch._dynamo.reset()
    assert torch.equal(compiled(torch.ones(1), False), torch.full((1,), 4.0))
    assert len(made) == 1


@canary("import_compiler", breaks="importing the compiler no earlier than it is wanted")
def test_compiler_is_imported_when_asked_for():
    code = (
        "import sys, compress_core; from compress_core import torch_internals\n"
        "loaded = lambda: [m for m in ('torch._dynamo', 'torch._inductor.compile_fx') if m in sys.modules]\n"
        "print(loaded()); torch_internals.import_compiler(); print(loaded())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "['torch._dynamo', 'torch._inductor.compile_fx']"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="there is no C++ compiler")
@canary("compile_graph", "import_compiler", breaks="compiling the kernels of fake-quantization")
def test_graph_is_compiled_for_tensors_of_any_size():
    traced = []

    def function(x, y):
        traced.append(1)
        return (x * 3 + y).relu(), x.sum(0)

    internals.import_compiler()
    with torch.no_grad():
        compiled = internals.compile_graph(function, [torch.empty(50, 8), torch.empty(8)])
    assert len(traced) == 1
    for rows, columns in ((50, 8), (7, 33), (1000, 5)):
        x, y = torch.randn(rows, columns), torch.randn(columns)
        result = compiled(x, y)
        assert len(traced) == 1
        torch.testing.assert_close(tuple(result), ((x * 3 + y).relu(), x.sum(0)))


# The list is complete, and it is the only place.


def test_failing_canary_says_what_torch_has_changed():
    @canary("is_view", breaks="this")
    def test():
        assert internals.is_view(torch.zeros(1))

    with pytest.raises(AssertionError, match=r"^torch .* changed what is_view stands for: this breaks; see there in"):
        test()


def test_every_name_has_a_canary():
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
