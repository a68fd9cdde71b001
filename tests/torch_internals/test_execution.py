"""Canaries: what surrounds the code that is running, and the backward pass."""

from datetime import timedelta

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.checkpoint import checkpoint

from compress_core import torch_internals as internals
from tests.torch_internals.canaries import canary


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


@canary("default_store", breaks="several processes cannot compress a model together")
def test_default_store_is_shared_has_a_time_limit_and_is_written_once(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=7)
    )
    try:
        store = internals.default_store()
        assert store is internals.default_store()
        assert store.timeout == timedelta(seconds=7)
        assert not store.check(["place"])
        assert [store.compare_set("place", "", value) for value in ("first", "second")] == [b"first", b"first"]
        assert store.get("place") == b"first"
        store.delete_key("place")
        assert not store.check(["place"])
    finally:
        dist.destroy_process_group()


@canary("onnx_translations_kept", breaks="that small models are exported in two thirds of the time")
def test_exporter_takes_its_table_from_an_earlier_export(monkeypatch):
    from torch.onnx._internal.exporter import _registration

    made = []
    original = _registration.ONNXRegistry.__dict__["from_torchlib"]

    def counted(cls, **options):
        made.append(options["opset_version"])
        return original.__func__(cls, **options)

    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", classmethod(counted))
    monkeypatch.setattr(internals, "_translations", {})
    program = torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.randn(3, 2),))
    graphs = []
    for opset in (18, 18, 21):
        with internals.onnx_translations_kept():
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        graphs.append([node.op_type for node in exported.model.graph])
    assert made == [18, 21]
    assert graphs[0] == graphs[1] == graphs[2] == ["Gemm"]
    assert _registration.ONNXRegistry.__dict__["from_torchlib"].__func__ is counted, "it is as it was"
