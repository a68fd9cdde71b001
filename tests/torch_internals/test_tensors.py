"""Canaries: fake tensors, structures, operators."""

import logging
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch._dynamo
from torch import nn

from compress_core import torch_internals as internals
from tests.torch_internals.canaries import canary


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


@canary("SubclassesDisabled", breaks="reading weights of compressed layers outside of a forward")
def test_functions_of_subclasses_can_be_disabled():
    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("called")

    tensor = torch.ones(2).as_subclass(Sub)
    with internals.SubclassesDisabled():
        assert torch.add(tensor, 1).sum() == 4


@canary("PARAMETER_MARK", breaks="parameters made from the weight of a compressed layer")
def test_parameters_made_from_subclasses_are_marked():
    class Sub(torch.Tensor):
        pass

    made = torch.nn.Parameter(torch.ones(2).as_subclass(Sub))
    assert type(made) is Sub
    assert getattr(made, internals.PARAMETER_MARK) is True


@canary("DispatchDisabled", breaks="making fake tensors of known shapes")
def test_dispatch_can_be_disabled_within_modes():
    with internals.FakeTensorMode() as mode:
        with internals.DispatchDisabled():
            empty = torch.empty_strided((2, 3), (1, 2), device="meta")
        fake = internals.FakeTensor(mode, empty, torch.device("cpu"))
        assert type(empty) is torch.Tensor
        assert type(torch.empty(2)) is internals.FakeTensor
        assert (fake.shape, fake.stride(), fake.device.type) == ((2, 3), (1, 2), "cpu")
        assert (fake + 1).fake_mode is mode
