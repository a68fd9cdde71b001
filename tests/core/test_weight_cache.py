"""The kept weight of eval mode: used while nothing changed, noticed whatever changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from compress_core import Stage, mask_weight
from compress_core.transforms import (
    WeightTransform,
    add_weight_transform,
    bypass_transforms,
    get_weight_transform,
    raw_parameter,
)


class Counted(WeightTransform):
    cacheable = True

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.register_buffer("offset", torch.zeros(3, 4))
        self.sign = 1.0
        self.calls = []

    def forward(self, weight):
        self.calls.append(1)
        return self.sign * (weight * self.factor) + self.offset


class Uncacheable(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, weight):
        self.calls.append(1)
        return weight + torch.rand(())


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    add_weight_transform(layer, "weight", Counted(), stage=Stage.PRECISION, key="q")
    return layer.eval()


def transform(layer):
    return get_weight_transform(layer, "weight", "q")


def expected(layer):
    t = transform(layer)
    return t.sign * (raw_parameter(layer, "weight") * t.factor) + t.offset


def entry(layer):
    return layer.weight_transforms["weight"]._entry


def test_weight_is_computed_once_in_eval_mode_without_gradients(layer):
    with torch.no_grad():
        first = layer.weight
        assert all(layer.weight is first for _ in range(5))
    assert len(transform(layer).calls) == 1
    with torch.inference_mode():
        assert layer.weight is first
    assert layer.weight is not first  # gradients are wanted now
    assert layer.weight.requires_grad
    with torch.no_grad():
        assert layer.weight is first


def replace_parameter(layer):
    layer.weight = nn.Parameter(torch.full((3, 4), 7.0))


CHANGES = {
    "parameter in place": lambda layer: raw_parameter(layer, "weight").add_(1),
    "parameter by .data": lambda layer: raw_parameter(layer, "weight").data.mul_(0.5),
    "parameter's .data replaced": lambda layer: setattr(raw_parameter(layer, "weight"), "data", torch.ones(3, 4)),
    "parameter replaced": replace_parameter,
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "optimizer": lambda layer: torch._foreach_add_([raw_parameter(layer, "weight")], 0.5),
    "parameter of the transform": lambda layer: transform(layer).factor.fill_(3.0),
    "parameter of the transform by .data": lambda layer: transform(layer).factor.data.fill_(3.0),
    "buffer in place": lambda layer: transform(layer).offset.add_(1),
    "buffer replaced": lambda layer: setattr(transform(layer), "offset", torch.ones(3, 4)),
    "attribute": lambda layer: setattr(transform(layer), "sign", -1.0),
    "in inference mode": lambda layer: torch.inference_mode()(lambda: raw_parameter(layer, "weight").add_(1))(),
    "numpy": lambda layer: raw_parameter(layer, "weight").detach().numpy().__imul__(3),
    "result written to": lambda layer: layer.weight.zero_(),
    "result written to by .data": lambda layer: layer.weight.data.zero_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(layer, name):
    with torch.no_grad():
        stale = layer.weight.clone()
        CHANGES[name](layer)
        after = layer.weight
        assert torch.equal(after, expected(layer))
        assert name.startswith("result") or not torch.equal(after, stale)
        assert layer.weight is after


def test_change_of_a_large_weight_by_data_is_noticed():
    layer = nn.Linear(300, 200).eval()
    mask_weight(layer, "weight")
    with torch.no_grad():
        assert layer.weight is layer.weight
        raw_parameter(layer, "weight").data.mul_(1.001)
        assert torch.equal(layer.weight, raw_parameter(layer, "weight"))


def test_added_and_removed_transforms_are_noticed(layer):
    with torch.no_grad():
        first = layer.weight.clone()
        handle = add_weight_transform(layer, "weight", Counted(3.0), stage=Stage.PRECISION, key="second")
        assert torch.equal(layer.weight, first * 3)
        handle.remove()
        assert torch.equal(layer.weight, first)
        with bypass_transforms(layer):
            assert torch.equal(layer.weight, raw_parameter(layer, "weight"))
        assert torch.equal(layer.weight, first)


def test_nothing_is_kept_in_training_mode_or_after_moves_and_copies(layer):
    with torch.no_grad():
        assert layer.weight is layer.weight
        assert entry(layer) is not None
        assert not any("entry" in name for name in layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert entry(twin) is None
            assert torch.equal(twin.weight, layer.weight)
            assert twin.weight is not layer.weight
        layer.to(torch.float64)
        assert entry(layer) is None
        assert layer.weight.dtype is torch.float64
        layer.train()
        assert entry(layer) is None
        assert layer.weight is not layer.weight
        assert entry(layer) is None


def test_transforms_that_do_not_opt_in_are_computed_each_time():
    layer = nn.Linear(4, 3).eval()
    add_weight_transform(layer, "weight", Uncacheable(), stage=Stage.PRECISION, key="q")
    mask_weight(layer, "weight")
    with torch.no_grad():
        assert not torch.equal(layer.weight, layer.weight)
    assert len(transform(layer).calls) == 2


def test_transform_in_training_mode_or_with_hooks_is_computed_each_time(layer):
    with torch.no_grad():
        transform(layer).train()
        assert layer.weight is not layer.weight
        transform(layer).eval()
        assert layer.weight is layer.weight
        transform(layer).register_forward_hook(lambda module, args, output: output + 1)
        assert torch.equal(layer.weight, expected(layer) + 1)
        assert layer.weight is not layer.weight


def test_autocast_is_part_of_the_key(layer):
    class Matmul(WeightTransform):
        cacheable = True

        def forward(self, weight):
            return weight @ torch.eye(4)

    add_weight_transform(layer, "weight", Matmul(), stage=Stage.PRECISION, key="matmul")
    with torch.no_grad():
        assert layer.weight.dtype is torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.weight.dtype is torch.bfloat16
        assert layer.weight.dtype is torch.float32


def test_functional_transforms_and_tracing_do_not_meet_the_cache(layer):
    x = torch.randn(2, 4)
    with torch.no_grad():
        kept = layer.weight
        weights = torch.randn(5, 3, 4)
        batched = torch.func.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))(weights)
        for weight, out in zip(weights, batched, strict=True):
            assert torch.allclose(out, x @ (2 * weight).T + layer.bias, atol=1e-6)
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), layer(x))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), layer(x))
        raw_parameter(layer, "weight").mul_(2)
        assert torch.equal(compiled(x), layer(x))
        assert torch.allclose(layer.weight, kept * 2)
        _, tangent = torch.func.jvp(
            lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), (weights[0],), (weights[1],)
        )
        assert torch.allclose(tangent, x @ (2 * weights[1]).T, atol=1e-6)


def test_channels_last_weights_are_kept_too():
    layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last).eval()
    mask_weight(layer, "weight")
    with torch.no_grad():
        assert layer.weight is layer.weight
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
