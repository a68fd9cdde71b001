"""Canaries: layers, hooks and the compiler."""

import copy
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.utils import prune

from compress_core import torch_internals as internals
from tests.conftest import ROOT
from tests.torch_internals.canaries import canary


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
        def __call__(self, *args):
            raise AssertionError("called")

    model = torch.nn.Linear(1, 1)
    for with_keywords in (True, False):
        model.register_forward_hook(Hook(), with_kwargs=with_keywords)
        model.register_forward_pre_hook(Hook(), with_kwargs=with_keywords)
    other = model.register_forward_hook(lambda module, args, output: output * 0)
    internals.remove_forward_hooks(model, Hook)
    assert model(torch.ones(1)) == 0
    other.remove()
    assert not internals.has_hooks(model)


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


@canary("computing_hooks", breaks="folding weights that old-style hooks compute")
def test_hooks_that_compute_a_tensor_are_known():
    layer = nn.Linear(3, 3)
    assert internals.computing_hooks(layer) == []
    layer.register_forward_pre_hook(lambda module, args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)
        spectral = nn.utils.spectral_norm(nn.Linear(3, 3))
    prune.l1_unstructured(layer, "bias", amount=1)
    names = [(name, kind.__name__) for name, kind in internals.computing_hooks(layer)]
    assert names == [("weight", "WeightNorm"), ("bias", "L1Unstructured")]
    assert [(name, kind.__name__) for name, kind in internals.computing_hooks(spectral)] == [("weight", "SpectralNorm")]


@canary("TENSOR_HOOK_ATTRIBUTES", breaks="putting back the hooks of tensors when a model is rolled back")
def test_hooks_of_tensors_are_known():
    kinds = {
        "_backward_hooks": lambda tensor: tensor.register_hook(lambda grad: grad),
        "_post_accumulate_grad_hooks": lambda tensor: tensor.register_post_accumulate_grad_hook(lambda tensor: None),
    }
    assert set(internals.TENSOR_HOOK_ATTRIBUTES) == set(kinds)
    for attribute, register in kinds.items():
        tensor = nn.Parameter(torch.ones(1))
        assert not any(getattr(tensor, name) for name in kinds)
        handle = register(tensor)
        assert [name for name in kinds if getattr(tensor, name)] == [attribute]
        handle.remove()
        assert not getattr(tensor, attribute)


@canary("global_hooks", breaks="seeing that an algorithm leaves hooks for all modules behind")
def test_hooks_for_all_modules_are_seen():
    before = internals.global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    changed = internals.global_hooks()
    handle.remove()
    assert changed != before and internals.global_hooks() == before


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


@canary("replica_override", breaks="the sentence by which DataParallel is refused")
def test_data_parallel_asks_each_layer_for_its_copy():
    (name,) = internals.replica_override(None)
    assert callable(getattr(nn.Module, name))
    # It needs several devices, which a test may not have.
    assert name in sys.modules["torch.nn.parallel.replicate"].replicate.__code__.co_names


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


@canary("checkpoint_of", "saved_tensors_hook", breaks="transforms inside checkpointed functions, in the backward pass")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_keeps_its_function_where_it_can_be_replaced(reentrant):
    outside, calls = internals.saved_tensors_hook(), []

    def function(x):
        if not calls:
            assert reentrant or internals.saved_tensors_hook() is not outside
            frame = sys._getframe(1)
            while internals.checkpoint_of(frame) is None:
                frame = frame.f_back
            owner, name = internals.checkpoint_of(frame)
            kept = getattr(owner, name)
            setattr(owner, name, lambda *args: (calls.append("again"), kept(*args))[1])
        calls.append("run")
        return x.sin().sin()

    x = torch.ones(1, requires_grad=True)
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant).backward()
    assert calls == ["run", "again", "run"]


@canary("CHECKPOINT_OPERATOR", breaks="compiling models with transforms inside checkpointed functions")
def test_modes_see_checkpoints_as_one_operator_when_compiled():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is internals.CHECKPOINT_OPERATOR:
                return func(lambda x: args[0](x) + 1, *args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    def run(x):
        with Mode():
            return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)

    x = torch.ones(1, requires_grad=True)
    assert torch.compile(run, backend="eager", fullgraph=True)(x) == x.sin() + 1


@canary("LOW_LEVEL_FUNCTIONS", breaks="naming the functions that pack sequences")
def test_functions_without_a_public_name_are_those_that_modes_see():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        nn.utils.rnn.pack_padded_sequence(torch.ones(2, 1, 1), torch.tensor([2]))
    assert internals.LOW_LEVEL_FUNCTIONS._pack_padded_sequence in seen
