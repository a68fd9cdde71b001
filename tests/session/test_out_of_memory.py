"""An error that says that memory ran out is not taken for a property of the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model

ERRORS = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
}
SECTIONS = {
    "filter_pruning": {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}},
    "quantization": {"algorithm": "quantization"},
    "magnitude_sparsity": {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.5,
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}},
    },
}


class Failing:
    """What the forwards of a model look up: a counter, which no snapshot can put back, and what to raise when."""

    def __init__(self, limit=0, error=None):
        self.counter, self.limit, self.error = itertools.count(1), limit, error

    def __deepcopy__(self, memo):
        return self


class Net(nn.Module):
    def __init__(self, failing):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
        self.failing = failing

    def forward(self, x):
        if next(self.failing.counter) == self.failing.limit:
            raise self.failing.error
        return self.body(x)


def run(failing, section, *, shrinks):
    torch.manual_seed(0)
    document = {"input_info": {"sample_size": [1, 2, 8, 8]}, "compression": [section]}
    controller, _ = create_compressed_model(Net(failing), document, init_loader=[torch.randn(4, 2, 8, 8)] * 2)
    if shrinks:
        controller.shrink()


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("name", SECTIONS)
def test_it_comes_through_from_every_forward(name, kind):
    shrinks, counting = name == "filter_pruning", Failing()
    run(counting, SECTIONS[name], shrinks=shrinks)
    forwards = next(counting.counter) - 1
    assert forwards >= 2
    for number in range(1, forwards + 1):
        # Forwards on batches are explained by an error of ours, whose cause it is.
        with pytest.raises(Exception) as raised:
            run(Failing(number, ERRORS[kind]), SECTIONS[name], shrinks=shrinks)
        assert ERRORS[kind] in (raised.value, raised.value.__cause__), number
