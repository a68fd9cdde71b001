"""Activation functions that transforms take over, and tensors that they may write to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from compress_core.transforms import (
    CallOutput,
    ModuleOutput,
    bypass_transforms,
)
from tests.activation_helpers import Function, FusedScale, Scale, add, calls

# Activation functions.


@pytest.mark.parametrize(
    ("function", "name", "activation"),
    [
        (F.relu, "torch.nn.functional.relu", "relu"),
        (lambda t: F.relu(t * 1, inplace=True), "torch.nn.functional.relu", "relu"),
        (torch.relu, "torch.relu", "relu"),
        (lambda t: t.relu(), "torch.Tensor.relu", "relu"),
        (F.relu6, "torch.nn.functional.relu6", "relu6"),
        (lambda t: F.relu6(input=t), "torch.nn.functional.relu6", "relu6"),
        (F.hardswish, "torch.nn.functional.hardswish", "hardswish"),
    ],
)
def test_activation_call_is_taken_over_by_the_transform(x, function, name, activation):
    x = 8 * x
    model, plain = Function(function), Function(function)
    transform = FusedScale()
    add(model, CallOutput("", name, calls()), transform)
    add(plain, CallOutput("", name, calls()), Scale())
    assert torch.equal(model(x), plain(x))
    assert transform.taken == [activation]
    with bypass_transforms(model):
        assert torch.equal(model(x), function(x))


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (nn.ReLU, "relu"),
        (lambda: nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6, "relu6"),
        (lambda: nn.ReLU6(inplace=True), "relu6"),
        (nn.Hardswish, "hardswish"),
        (lambda: nn.Hardswish(inplace=True), "hardswish"),
    ],
)
def test_activation_module_is_taken_over_by_the_transform(x, make, activation):
    x = 8 * x
    model, transform = nn.Sequential(nn.Identity(), make()), FusedScale()
    expected = 10 * model(x.clone())
    add(model, ModuleOutput("1"), transform)
    assert torch.equal(model(x.clone()), expected)
    assert transform.taken == [activation]
    handle = transform.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(model(x.clone()), expected + 1)
    assert len(transform.taken) == 1
    handle.remove()
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x.clone()), expected)


@pytest.mark.parametrize("cls", [Scale, FusedScale])
@pytest.mark.parametrize(
    "function", [lambda m, t: m(t), lambda m, t: F.relu(t, inplace=True), lambda m, t: F.relu(t, True)]
)
def test_what_works_in_place_still_does(x, function, cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, t):
            out = function(self.act, t)
            return out, t + 1

    model, transform = Net(), cls()
    add(model, CallOutput("", "torch.nn.functional.relu", calls()), transform)
    out, after = model(x.clone())
    assert torch.equal(out, 10 * F.relu(x))
    assert torch.equal(after, F.relu(x) + 1)


@pytest.mark.parametrize("hook", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("make", [nn.ReLU, lambda: nn.Linear(3, 3)])
def test_hooks_of_a_transform_are_called(x, make, hook):
    model, transform, seen = nn.Sequential(make()), OwningScale(), []
    add(model, ModuleOutput("0"), transform)
    getattr(transform, f"register_{hook}")(lambda *args: seen.append(1))
    model(x.requires_grad_()).sum().backward()
    assert seen == [1]


def test_only_named_activations_are_taken_over(x):
    model, transform = nn.Sequential(nn.Hardswish(), nn.ReLU()), FusedScale()
    transform.fused_activations = {"relu"}
    add(model, ModuleOutput("0"), transform)
    add(model, ModuleOutput("1"), transform)
    assert torch.equal(model(x), 10 * F.relu(10 * F.hardswish(x)))
    assert transform.taken == ["relu"]


@pytest.mark.parametrize("transformed", [0, 1])
def test_relu_that_is_taken_over_is_counted_above(x, transformed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, t):
            return F.relu(self.act(t) - 1)

    model, inner, outer = Net(), FusedScale(), FusedScale(3.0)
    add(model, ModuleOutput("act"), inner)
    add(model, CallOutput("", "torch.nn.functional.relu", calls(transformed, (0, 1))), outer)
    if transformed:
        assert torch.equal(model(x), 3 * F.relu(10 * F.relu(x) - 1))
        assert (inner.taken, outer.taken) == (["relu"], ["relu"])
    else:  # both stand behind the same call, and only the outer one can take it over
        assert torch.equal(model(x), F.relu(10 * 3 * F.relu(x) - 1))
        assert (inner.taken, outer.taken) == ([], ["relu"])


def test_subclass_of_relu_keeps_its_own_forward(x):
    class Shifted(nn.ReLU):
        def forward(self, t):
            return super().forward(t) + 1

    model, transform = nn.Sequential(Shifted()), FusedScale()
    add(model, ModuleOutput("0"), transform)
    assert torch.equal(model(x), 10 * (F.relu(x) + 1))
    assert not transform.taken


# Tensors that nobody else has.


class OwningScale(FusedScale):
    owns_input = True

    def __init__(self):
        super().__init__()
        self.owned = 0

    def forward_owned(self, x):
        self.owned += 1
        return self(x) if torch.is_grad_enabled() else x.mul_(self.factor)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), nn.GELU, lambda: nn.LayerNorm(3)])
def test_what_a_layer_has_just_made_may_be_written_to(x, make):
    model, transform = nn.Sequential(nn.Identity(), make()), OwningScale()
    expected = 10 * model(x)
    add(model, ModuleOutput("1"), transform)
    kept = x.clone()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert transform.owned == 1
        handle = transform.register_forward_hook(lambda module, args, output: output + 1)
        assert torch.equal(model(x), expected + 1)
        handle.remove()
        assert transform.owned == 1
        with bypass_transforms(model):
            torch.testing.assert_close(10 * model(x), expected)
    assert torch.equal(x, kept)


class KeepingMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.kept.append(result)
        return result


class ReturnsItsInput(nn.Linear):
    def forward(self, x):
        return x


@pytest.mark.parametrize("make", [nn.Identity, nn.Dropout, nn.Flatten, nn.ReLU, lambda: ReturnsItsInput(3, 3)])
def test_what_others_may_have_is_not_written_to(x, make):
    model, transform = nn.Sequential(make()).eval(), OwningScale()
    add(model, ModuleOutput("0"), transform)
    kept = x.clone()
    with torch.no_grad():
        model(x)
    assert transform.owned == 0
    assert torch.equal(x, kept)


def test_what_a_mode_of_the_user_may_keep_is_not_written_to(x):
    model, transform = nn.Sequential(nn.Linear(3, 3)), OwningScale()
    expected = model(x)
    add(model, ModuleOutput("0"), transform)
    with torch.no_grad(), KeepingMode() as mode:
        model(x)
    assert transform.owned == 0
    assert torch.equal(mode.kept[0], expected)
