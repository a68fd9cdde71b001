"""Activation transforms: adding, removing, copies, pickles and compilers."""

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from compress_core import Stage, TransformError, mask_weight
from compress_core.transforms import (
    CallInput,
    CallOutput,
    ModuleInput,
    ModuleOutput,
    activation_transforms,
    bake_transforms,
    bypass_transforms,
    get_activation_transform,
    has_transforms,
    strip_activation_transforms,
)
from tests.activation_helpers import Function, FusedScale, Scale, add, calls


def test_shared_transform_is_one_set_of_parameters(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared = Scale(2.0)
    add(model, ModuleOutput("0"), shared)
    add(model, ModuleOutput("1"), shared)
    assert sum(parameter is shared.factor for parameter in model.parameters()) == 1
    twin = copy.deepcopy(model)
    first, second = (get_activation_transform(twin, ModuleOutput(name), "q") for name in "01")
    assert first is second
    assert first is not shared
    model(x).sum().backward()
    factor = torch.tensor(2.0, requires_grad=True)
    hidden = factor * F.linear(x, model[0].weight, model[0].bias)
    (factor * F.linear(hidden, model[1].weight, model[1].bias)).sum().backward()
    assert torch.allclose(shared.factor.grad, factor.grad)


def test_stages_order_the_transforms_of_one_place(x):
    class Plus(nn.Module):
        def forward(self, t):
            return t + 1

    model = nn.Identity()
    add(model, ModuleOutput(""), Scale(2.0), key="late", stage=Stage.PRECISION)
    add(model, ModuleOutput(""), Plus(), key="early", stage=Stage.STRUCTURE)
    assert torch.equal(model(x), 2 * (x + 1))
    assert [handle.key for handle in activation_transforms(model)] == ["early", "late"]
    assert [handle.stage for handle in activation_transforms(model)] == [Stage.STRUCTURE, Stage.PRECISION]


def test_removing_gives_the_module_its_class_back(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    mask_weight(model, "0.weight")
    places = [ModuleInput(""), ModuleOutput("0"), CallOutput("1", "torch.nn.functional.linear", calls())]
    handles = [add(model, place) for place in places]
    assert [handle.place for handle in activation_transforms(model)] == places
    handles[1].remove()
    assert model[0].weight is not None
    assert type(model[0]) is not nn.Linear
    with pytest.raises(TransformError, match="0: output' has no transform named 'q'"):
        handles[1].remove()
    activation_transforms(model)[0].remove()
    handles[2].remove()
    assert not activation_transforms(model)
    assert has_transforms(model)
    bake_transforms(model)
    assert not has_transforms(model)
    assert [type(module) for module in model.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_substitute_stands_where_the_other_did(x):
    class Plus(nn.Module):
        def forward(self, t):
            return t + 1

    model = nn.Identity().eval()
    first = add(model, ModuleOutput(""), Scale(2.0), key="a")
    add(model, ModuleOutput(""), Scale(10.0), key="b")
    substitute = first.substitute(Plus().train())
    assert torch.equal(model(x), 10 * (x + 1))
    handles = activation_transforms(model)
    assert handles[0] == substitute
    assert [(handle.key, handle.stage) for handle in handles] == [("a", first.stage), ("b", first.stage)]
    assert not substitute.transform.training
    with pytest.raises(TransformError, match="output' has no transform named 'a'"):
        first.substitute(Plus())
    substitute.remove()
    assert torch.equal(model(x), 10 * x)


def test_strip_removes_all_and_bake_keeps_activations(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain = model(x)
    mask_weight(model, "0.weight", torch.eye(3))
    add(model, ModuleInput(""))
    add(model, ModuleOutput("1"))
    expected = model(x)
    bake_transforms(model)
    assert torch.equal(model(x), expected)
    strip_activation_transforms(model)
    assert not has_transforms(model)
    assert type(model) is nn.Sequential
    assert not torch.equal(model(x), plain)  # what was baked into the weights stays


def test_bypass_computes_as_if_nothing_was_added(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    plain = model(x)
    add(model, ModuleOutput("1"), FusedScale())
    add(model, CallInput("0", "torch.nn.functional.linear", calls(), (0,)))
    with bypass_transforms(model):
        assert torch.equal(model(x), plain)
    assert not torch.equal(model(x), plain)


def test_refusals_name_the_place_and_change_nothing():
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(3, 3)]), "mha": nn.MultiheadAttention(4, 2)})
    model["script"] = torch.jit.script(nn.Linear(3, 3))
    model["accelerated"] = nn.Linear(3, 3)
    model["accelerated"].forward = lambda t: t
    model["taken"] = nn.Linear(3, 3)
    model["taken"].activation_transforms = "mine"
    classes = [type(module) for module in model.modules()]
    for place, message in (
        (ModuleOutput("nowhere"), "no module 'nowhere'"),
        (ModuleOutput("list"), "'list' .* has no forward"),
        (ModuleOutput("script"), "'script' .* is a ScriptModule"),
        (ModuleOutput("accelerated"), "'accelerated' .* has a forward of its own"),
        (ModuleInput("mha.out_proj"), "'mha.out_proj' .* is never called"),
        (ModuleOutput("taken"), "attribute 'activation_transforms' of its own"),
        (CallOutput("list.0", "torch.no_such", calls()), "no function 'torch.no_such'"),
    ):
        with pytest.raises(TransformError, match=message):
            add(model, place)
    with pytest.raises(TransformError, match="must not be empty or dotted"):
        add(model, ModuleOutput("list.0"), key="a.b")
    assert [type(module) for module in model.modules()] == classes
    add(model, ModuleOutput("list.0"))
    with pytest.raises(TransformError, match="already has a transform named 'q'"):
        add(model, ModuleOutput("list.0"))


class IteratesChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, t):
        for child in self.children():
            t = child(t)
        return t


@pytest.mark.parametrize("make", [IteratesChildren, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))])
def test_modules_that_call_their_children_in_turn(x, make):
    model = make()
    plain = model(x)
    add(model, ModuleOutput(""), Scale(2.0))
    assert torch.equal(model(x), 2 * plain)
    assert len(list(model.children())) == 2
    assert "activation_transforms.output.q.factor" in model.state_dict()
    assert "activation_transforms.output.q.factor" in dict(model.named_parameters())
    model.to(torch.float64)
    assert get_activation_transform(model, ModuleOutput(""), "q").factor.dtype is torch.float64
    assert not get_activation_transform(model.eval(), ModuleOutput(""), "q").training


def test_plain_state_dict_loads_and_incomplete_ones_do_not():
    class Two(Scale):
        def __init__(self):
            super().__init__()
            self.register_buffer("low", torch.zeros(()))

    model = nn.Sequential(nn.Linear(3, 3))
    plain = copy.deepcopy(model.state_dict())
    add(model, ModuleInput(""), Two())
    add(model, ModuleOutput("0"), Two())
    model.load_state_dict(plain, strict=True)
    full = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(full, strict=True)
    assert get_activation_transform(model, ModuleInput(""), "q").factor == 11
    assert get_activation_transform(model, ModuleOutput("0"), "q").low == 1
    for missing in ("0.activation_transforms.output.q.low", "activation_transforms.input_0.q.low"):
        with pytest.raises(RuntimeError, match=missing):
            model.load_state_dict({key: value for key, value in full.items() if key != missing})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        model.load_state_dict({**full, "0.activation_transforms.nonsense": torch.ones(())})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True), assign=True)


def test_module_used_twice(x):
    inner = nn.Linear(3, 3)
    model = nn.Sequential(inner, inner)
    add(model, ModuleOutput("0"), Scale(2.0))
    hidden = 2 * F.linear(x, inner.weight, inner.bias)
    assert torch.allclose(model(x), 2 * F.linear(hidden, inner.weight, inner.bias))
    assert [handle.place for handle in activation_transforms(model)] == [ModuleOutput("0")]


def test_functional_call(x):
    model = nn.Sequential(nn.Linear(3, 3))
    add(model, ModuleOutput("0"), Scale(2.0))
    values = {"0.activation_transforms.output.q.factor": torch.tensor(3.0)}
    plain = F.linear(x, model[0].weight, model[0].bias)
    assert torch.allclose(torch.func.functional_call(model, values, (x,)), 3 * plain)
    assert torch.allclose(model(x), 2 * plain)


def test_averaged(x):
    model = nn.Sequential(nn.Linear(3, 3))
    add(model, ModuleOutput("0"), Scale(2.0))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(x, use_reentrant):
    class Net(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.block, self.checkpointed = (
                Function(lambda t: torch.tanh(t) + torch.sigmoid(torch.tanh(t))),
                checkpointed,
            )

        def forward(self, t):
            t = t * 2
            return checkpoint(self.block, t, use_reentrant=use_reentrant) if self.checkpointed else self.block(t)

    gradients = []
    for checkpointed in (True, False):
        model, t = Net(checkpointed), x.clone().requires_grad_()
        add(model, ModuleInput("block"), Scale(2.0))
        place = CallOutput("block", "torch.tanh", calls(1, (0, 1)))
        add(model, place, Scale(3.0))
        model(t).sum().backward()
        gradients.append((t.grad, get_activation_transform(model, place, "q").factor.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_threads_do_not_meet(x):
    model = Function(lambda t: [t := torch.sigmoid(t) for _ in range(40)][-1])
    add(model, CallOutput("", "torch.sigmoid", calls(1, tuple(range(40)))), Scale(2.0))
    expected, wrong = model(x), []

    def run():
        wrong.extend(1 for _ in range(20) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fused_transformer_layers_are_off_where_they_would_bypass_transforms():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    t, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    handle = add(model, ModuleOutput("layers.1.linear1"), Scale(0.5))
    add(model, ModuleOutput("layers.0.self_attn", (0,)), Scale(2.0))
    expected, masked = model(t), model(t, src_key_padding_mask=padding)  # gradients keep the fast path off
    with torch.no_grad():
        assert torch.allclose(model(t), expected, atol=1e-6)
        fast = model(t, src_key_padding_mask=padding)
    assert torch.allclose(fast[~padding], masked[~padding], atol=1e-6)
    handle.remove()
    assert type(model) is not nn.TransformerEncoder
    for other in activation_transforms(model):
        other.remove()
    assert type(model) is nn.TransformerEncoder


def test_user_modes_and_default_devices_stay_in_force(x):
    seen = []

    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(torch.overrides.resolve_name(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(Function(torch.sigmoid))
    add(model, CallOutput("", "torch.sigmoid", calls()), Scale(2.0))
    add(model, ModuleOutput("0"), Scale(3.0))
    with Log():
        result = model(x)
        assert torch._C._len_torch_function_stack() == 1
    assert torch.allclose(result, 6 * torch.sigmoid(x))
    assert seen == ["torch.sigmoid", "torch.Tensor.mul", "torch.Tensor.mul"]


def test_exception_in_a_transform_leaves_no_mode_behind(x):
    class Fails(nn.Module):
        def forward(self, t):
            raise ValueError("injected")

    model = nn.Sequential(nn.Identity(), Function(torch.sigmoid))
    add(model, CallOutput("", "torch.sigmoid", calls()))
    handle = add(model, ModuleOutput("0"), Fails())
    with pytest.raises(ValueError, match="injected"):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    handle.remove()
    assert torch.equal(model(x), 10 * torch.sigmoid(x))
