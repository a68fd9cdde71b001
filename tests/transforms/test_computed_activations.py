"""Transforms that stand in the place of an activation function and take its argument."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import Stage, TransformError
from compress_core.transforms import (
    ACTIVATION_FUNCTIONS,
    COMPUTABLE_ACTIVATIONS,
    ActivationTransform,
    CallOutput,
    ModuleOutput,
    activation_transforms,
    bypass_transforms,
)
from compress_core.transforms.chain import TransformChain
from tests.activation_helpers import Function, FusedScale, Scale, add, calls

SILU = "torch.nn.functional.silu"


class Steps(ActivationTransform):
    """Stands in the place of an activation function and computes something that no function of its result is."""

    computes_activation = "silu"

    def forward(self, x):
        return torch.where(x > 0, x, x.abs() / 2)


class InPlaceOf(Steps):
    def __init__(self, activation):
        super().__init__()
        self.computes_activation = activation


class InsideOut(nn.Module):
    """Reads what it gave to an in-place function afterwards."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t):
        t = t * 1
        out = self.function(t)
        return out, t + 1


@pytest.mark.parametrize(
    ("function", "name", "activation"),
    [
        (F.silu, SILU, "silu"),
        (lambda t: F.silu(input=t), SILU, "silu"),
        (nn.SiLU(), SILU, "silu"),
        (F.relu, "torch.nn.functional.relu", "relu"),
        (torch.relu, "torch.relu", "relu"),
        (lambda t: t.relu(), "torch.Tensor.relu", "relu"),
        (F.relu6, "torch.nn.functional.relu6", "relu6"),
        (F.hardswish, "torch.nn.functional.hardswish", "hardswish"),
    ],
)
def test_the_transform_is_given_the_argument(x, function, name, activation):
    model = Function(function)
    handle = add(model, CallOutput("", name, calls()), InPlaceOf(activation))
    assert torch.equal(model(x), Steps()(x))
    assert not torch.equal(model(x), function(x))
    with bypass_transforms(model):
        assert torch.equal(model(x), function(x))
    handle.remove()
    assert torch.equal(model(x), function(x))


@pytest.mark.parametrize(
    ("function", "name", "activation"),
    [
        (lambda t: F.silu(t, inplace=True), SILU, "silu"),
        (lambda t: F.silu(t, True), SILU, "silu"),
        (nn.SiLU(inplace=True), SILU, "silu"),
        (torch.relu_, "torch.relu_", "relu"),
        (lambda t: t.relu_(), "torch.Tensor.relu_", "relu"),
        (lambda t: F.relu(t, inplace=True), "torch.nn.functional.relu", "relu"),
    ],
)
def test_in_place_functions_still_write(x, function, name, activation):
    model = InsideOut(function)
    add(model, CallOutput("", name, calls()), InPlaceOf(activation))
    expected = Steps()(x)
    with torch.no_grad():
        out, after = model(x)
    assert torch.equal(out, expected)
    assert torch.equal(after, expected + 1)
    given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, after = model(given)
    (out.square() + after).sum().backward()
    (Steps()(other).square() + Steps()(other)).sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(given.grad, other.grad)


@pytest.mark.parametrize("earlier", [Stage.STRUCTURE, Stage.PRECISION])
@pytest.mark.parametrize("first", [False, True])
def test_it_comes_before_all_others_whatever_their_stages(x, earlier, first):
    model, place = Function(F.silu), CallOutput("", SILU, calls())
    if first:
        add(model, place, Steps(), key="gate")
    scale = add(model, place, Scale(), key="scale", stage=earlier)
    if not first:
        add(model, place, Steps(), key="gate")
    assert [handle.key for handle in activation_transforms(model)] == ["gate", "scale"]
    assert torch.equal(model(x), 10 * Steps()(x))
    scale.remove()
    assert torch.equal(model(x), Steps()(x))


def test_the_output_of_the_module_can_have_transforms_too(x):
    model = nn.Sequential(nn.SiLU(), nn.SiLU())
    add(model, CallOutput("0", SILU, calls()), Steps())
    add(model, ModuleOutput("0"), FusedScale())
    assert torch.equal(model(x), F.silu(10 * Steps()(x)))


def test_a_shared_module_is_told_apart_by_its_calls(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU(inplace=True)

        def forward(self, t):
            return self.act(self.act(t * 1) - 1)

    model = Net()
    add(model, CallOutput("", SILU, calls(1, (0, 1))), Steps())
    assert torch.equal(model(x), Steps()(F.silu(x) - 1))


def test_hooks_of_the_transform_are_called(x):
    model, transform, seen = Function(F.silu), Steps(), []
    add(model, CallOutput("", SILU, calls()), transform)
    transform.register_forward_hook(lambda module, args, output: seen.append(torch.equal(args[0], x)))
    model(x)
    assert seen == [True]


def test_a_transform_that_fuses_everything_does_not_fuse_silu(x):
    assert set(COMPUTABLE_ACTIVATIONS) - set(ACTIVATION_FUNCTIONS) == {"silu"}
    model, transform = Function(F.silu), FusedScale()
    add(model, CallOutput("", SILU, calls()), transform)
    assert torch.equal(model(x), 10 * F.silu(x))
    assert not transform.taken


@pytest.mark.parametrize(
    ("place", "transform", "says"),
    [
        (ModuleOutput("0"), Steps(), "computes the activation function 'silu' itself, so its place is the CallOutput"),
        (CallOutput("", "torch.sigmoid", calls()), Steps(), "its place is the CallOutput of that function"),
        (CallOutput("", SILU, calls(), (0,)), Steps(), "its place is the CallOutput of that function"),
        (CallOutput("", SILU, calls()), InPlaceOf("relu"), "its place is the CallOutput of that function"),
        (CallOutput("", SILU, calls()), InPlaceOf("gelu"), "a transform can do that for hardswish, relu, relu6, silu"),
    ],
)
def test_other_places_are_refused(x, place, transform, says):
    model = nn.Sequential(nn.SiLU())
    with pytest.raises(TransformError, match=says):
        add(model, place, transform)
    assert type(model) is nn.Sequential
    assert torch.equal(model(x), F.silu(x))


def test_two_of_them_at_one_place_are_refused(x):
    model, place = Function(F.silu), CallOutput("", SILU, calls())
    add(model, place, Steps(), key="gate")
    with pytest.raises(TransformError, match="so does another transform there"):
        add(model, place, Steps(), key="other")
    scale = add(model, place, Scale(), key="scale")
    with pytest.raises(TransformError, match="so does another transform there"):
        scale.substitute(Steps())
    assert torch.equal(model(x), 10 * Steps()(x))


def test_substituting_changes_what_takes_the_place_of_the_function(x):
    model, place = Function(F.silu), CallOutput("", SILU, calls())
    add(model, place, Scale(2.0), key="scale")
    handle = add(model, place, Scale(), key="gate").substitute(Steps())
    assert torch.equal(model(x), 2 * Steps()(x))
    handle = handle.substitute(Scale(3.0))
    assert torch.equal(model(x), 3 * (2 * F.silu(x)))
    elsewhere = add(nn.Sequential(nn.SiLU()), ModuleOutput("0"), Scale())
    with pytest.raises(TransformError, match="its place is the CallOutput"):
        elsewhere.substitute(Steps())


def test_where_it_cannot_be_given_the_argument_the_forward_is_refused(x):
    chain = TransformChain()
    transform = Steps()
    transform.label = "act|GATE"
    chain.add("gate", transform, int(Stage.PRECISION))
    for method in (chain, chain.forward_owned):
        with pytest.raises(TransformError, match=r"'act\|GATE' computes the activation function 'silu' itself"):
            method(x)
    chain.bypassed = True
    assert chain(x) is x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Function(F.silu)

        def forward(self, t):
            return self.inner(t)

    model = Net()
    add(model, CallOutput("inner", SILU, calls()), transform)
    add(model, CallOutput("", SILU, calls()), Scale())
    with pytest.raises(TransformError, match=r"'act\|GATE' computes .*silu itself, and a transform of an outer module"):
        model(x)


def test_copies_pickles_and_compiled_models_compute_the_same(x):
    for inplace in (False, True):
        model = nn.Sequential(nn.Linear(3, 3), nn.SiLU(inplace=inplace), nn.Linear(3, 3))
        add(model, CallOutput("1", SILU, calls()), Steps())
        add(model, ModuleOutput("1"), Scale())
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def test_what_torch_refuses_is_refused_by_torch(x):
    model = Function(lambda t: F.silu())
    add(model, CallOutput("", SILU, calls()), Steps())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model(x)
