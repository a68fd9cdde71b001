"""A constant that a forward computes once and keeps: it stays what the plain model would keep."""

import copy
import functools

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model, register_default_init_args
from compress_core.torch_internals import FakeTensor
from compress_core.trace import trace


class Base(nn.Module):
    """A network that concatenates or adds a constant; subclasses say where it is kept."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(9, 4, 1)

    def make(self, size):
        return torch.arange(size).float().expand(1, 1, size, -1) / size

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        y = torch.cat([y, self.grid_of(y.shape[-1]).expand(len(y), -1, -1, -1)], 1)
        return self.out(y) / 2  # a call of the function that makes the constant, too

    def kept(self):
        raise NotImplementedError


class Attribute(Base):
    def __init__(self):
        super().__init__()
        self.grid = None

    def grid_of(self, size):
        if self.grid is None or self.grid.shape[-1] != size:
            self.grid = self.make(size)
        return self.grid

    def kept(self):
        return [] if self.grid is None else [self.grid]


class Buffer(Attribute):
    def __init__(self):
        super().__init__()
        del self.grid
        self.register_buffer("grid", None, persistent=False)


class UnderNoGrad(Attribute):
    def grid_of(self, size):
        with torch.no_grad():
            return super().grid_of(size)


class UnderInferenceMode(Attribute):
    def make(self, size):
        with torch.inference_mode():
            grid = super().make(size)
        return grid.clone()


class ByDict(Base):
    def __init__(self):
        super().__init__()
        self.grids = {}

    def grid_of(self, size):
        if size not in self.grids:
            self.grids[size] = self.make(size)
        return self.grids[size]

    def kept(self):
        return list(self.grids.values())


class ByClass(ByDict):
    grids = {}  # noqa: RUF012 - as users write it

    def __init__(self):
        super().__init__()
        del self.grids
        ByClass.grids.clear()


@functools.lru_cache
def cached_grid(size):
    return torch.arange(size).float().expand(1, 1, size, -1) / size


class ByFunction(Base):
    def __init__(self):
        super().__init__()
        cached_grid.cache_clear()

    def grid_of(self, size):
        return cached_grid(size)

    def kept(self):
        return [None] * cached_grid.cache_info().currsize


class OfSubmodule(Base):
    class Grid(nn.Module):
        grid = None

        def forward(self, size):
            if self.grid is None or self.grid.shape[-1] != size:
                self.grid = torch.arange(size).float().expand(1, 1, size, -1) / size
            return self.grid

    def __init__(self):
        super().__init__()
        self.positions = self.Grid()

    def grid_of(self, size):
        return self.positions(size)

    def kept(self):
        return [] if self.positions.grid is None else [self.positions.grid]


KINDS = [Attribute, Buffer, UnderNoGrad, UnderInferenceMode, ByDict, ByClass, ByFunction, OfSubmodule]
ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}
QUANTIZED = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}, **ADAPTATION}}
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3, "initializer": ADAPTATION}


def images(size=8):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def create(model, *sections, state=None):
    config = register_default_init_args({"compression": list(sections)}, [(images(), 0)] * 4)
    return create_compressed_model(model, config, compression_state=state)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_the_plain_model(kind, warm, caplog):
    model = kind()
    if warm:
        model.eval()(images())
    before = list(model.kept())
    create(model.train(), SPARSE, QUANTIZED)
    assert len(model.kept()) == len(before)
    assert all(a is b for a, b in zip(model.kept(), before, strict=True))
    assert "example input led to" not in caplog.text
    model.eval()(images())
    for grid in model.kept():
        assert grid is None or (type(grid) is torch.Tensor and not grid.is_inference())
    assert "example input led to" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_trained_copied_and_loaded(kind):
    controller, model = create(kind(), SPARSE, QUANTIZED)
    model.train()
    for size in (8, 12, 12):
        model(images(size)).square().mean().backward()
    for grid in model.kept():
        assert grid is None or not grid.requires_grad
    copied = copy.deepcopy(model)
    _, again = create(kind(), SPARSE, QUANTIZED, state=controller.get_compression_state())
    again.load_state_dict(model.state_dict())
    expected = model.eval()(images())
    assert torch.equal(copied.eval()(images()), expected)
    assert torch.equal(again.eval()(images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_forward_that_makes_other_calls_is_traced(kind):
    model = kind()
    cold = trace(model, images())
    assert [len(f.calls) for f in cold.forwards] == sorted((len(f.calls) for f in cold.forwards), reverse=True)
    assert len(cold.forwards) == 2
    assert not any(isinstance(grid, FakeTensor) for grid in model.kept())
    assert model.kept() == []
    model(images())
    assert len(trace(model, images()).forwards) == 1
