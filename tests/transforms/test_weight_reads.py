"""Layers compute with the weight that is stored now, in eval mode too: nothing is kept from one read to the next."""

import numpy as np
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
from compress_quantization.fake_quantize import SymmetricFakeQuantize


class Affine(WeightTransform):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))
        self.register_buffer("offset", torch.zeros(3, 4))
        self.sign = 1.0

    def forward(self, weight):
        return self.sign * (weight * self.factor) + self.offset


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    add_weight_transform(layer, "weight", Affine(), stage=Stage.PRECISION, key="q")
    return layer.eval()


def transform(layer):
    return get_weight_transform(layer, "weight", "q")


def expected(layer):
    t = transform(layer)
    return t.sign * (raw_parameter(layer, "weight") * t.factor) + t.offset


def one_element_by_data(weight, view):
    weight.data[3, 5] = 7.0


def a_part_by_data(weight, view):
    part = weight.data[100:200]
    part += 0.25


def one_element_by_numpy(weight, view):
    weight.detach().numpy()[3, 5] = 7.0


def one_element_by_memory_from_elsewhere(weight, view):
    view[3, 5] = 7.0


WRITES = [one_element_by_data, a_part_by_data, one_element_by_numpy, one_element_by_memory_from_elsewhere]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["mask", "quantizer"])
def test_a_few_elements_of_a_large_weight_are_seen(kind, write):
    torch.manual_seed(0)
    memory = np.random.default_rng(0).standard_normal((2000, 2000), dtype=np.float32)  # 4M elements
    layer = nn.Linear(2000, 2000, bias=False).eval()
    layer.weight = nn.Parameter(torch.from_numpy(memory))
    if kind == "mask":
        mask_weight(layer, "weight")
    else:
        quantizer = SymmetricFakeQuantize((2000, 1), signed=True)
        with torch.no_grad():
            quantizer.scale.fill_(8.0)
        add_weight_transform(layer, "weight", quantizer, stage=Stage.PRECISION, key="q")
    stored, x = raw_parameter(layer, "weight"), torch.eye(2000)
    with torch.no_grad():
        before, before_out = layer.weight.clone(), layer(x)
        write(stored, memory)
        fresh = get_weight_transform(layer, "weight", "mask" if kind == "mask" else "q")(stored)
        assert not torch.equal(fresh, before)
        assert torch.equal(layer.weight, fresh)
        assert not torch.equal(layer(x), before_out)


def replace_parameter(layer):
    layer.weight = nn.Parameter(torch.full((3, 4), 7.0))


CHANGES = {
    "parameter in place": lambda layer: raw_parameter(layer, "weight").add_(1),
    "parameter's .data replaced": lambda layer: setattr(raw_parameter(layer, "weight"), "data", torch.ones(3, 4)),
    "parameter replaced": replace_parameter,
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "parameter of the transform by .data": lambda layer: transform(layer).factor.data.fill_(3.0),
    "buffer replaced": lambda layer: setattr(transform(layer), "offset", torch.ones(3, 4)),
    "attribute": lambda layer: setattr(transform(layer), "sign", -1.0),
    "in inference mode": lambda layer: torch.inference_mode()(lambda: raw_parameter(layer, "weight").add_(1))(),
    "dtype": lambda layer: layer.to(torch.float64),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen_in_eval_mode(layer, name):
    with torch.no_grad():
        stale = layer.weight.clone()
        CHANGES[name](layer)
        assert torch.equal(layer.weight, expected(layer))
        assert layer.weight.dtype != stale.dtype or not torch.equal(layer.weight, stale)


def test_writing_to_what_was_read_changes_no_later_read(layer):
    with torch.no_grad():
        layer.weight.zero_()
        assert torch.equal(layer.weight, expected(layer))


def test_added_removed_and_bypassed_transforms_are_seen(layer):
    with torch.no_grad():
        first = layer.weight.clone()
        handle = add_weight_transform(layer, "weight", Affine(3.0), stage=Stage.PRECISION, key="second")
        assert torch.equal(layer.weight, first * 3)
        handle.remove()
        assert torch.equal(layer.weight, first)
        with bypass_transforms(layer):
            assert torch.equal(layer.weight, raw_parameter(layer, "weight"))
        assert torch.equal(layer.weight, first)


def test_functional_transforms_and_tracing_in_eval_mode(layer):
    x = torch.randn(2, 4)
    with torch.no_grad():
        before = layer.weight
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
        assert torch.allclose(layer.weight, before * 2)
        _, tangent = torch.func.jvp(
            lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), (weights[0],), (weights[1],)
        )
        assert torch.allclose(tangent, x @ (2 * weights[1]).T, atol=1e-6)
