"""What tests of transforms share."""

from __future__ import annotations

import functools
import itertools
import logging

import torch
import torch.nn.functional as F
from torch import nn

from compress_core.transforms import CallInput, CallOutput, ModuleOutput
from tests.activation_helpers import Scale, add, calls

RELU, ADD = "torch.nn.functional.relu", "torch.add"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.act(torch.add(self.b(x), x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x, *, shift=None):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.relu(torch.add(x, x if shift is None else shift)))


def compute(tensor):
    """What hooks compute: calls of the functions that the model calls."""
    doubled = torch.add(tensor, tensor)
    return (F.relu(doubled) + F.linear(tensor, torch.eye(tensor.shape[-1])) + torch.relu(tensor)).abs().sum()


class Statistics:
    """A hook of any kind that notes what it sees and what it computes from it."""

    def __init__(self):
        self.seen = []
        self.runs = itertools.count()  # which goes on in forwards that leave no trace

    def look(self, value):
        next(self.runs)
        value = value[0] if isinstance(value, tuple) else value
        self.seen.append((value.detach().clone(), compute(value.detach())))

    def after(self, module, args, *rest):
        self.look(rest[-1])

    def before(self, module, args, *rest):
        self.look(args)

    def assert_exact(self):
        assert self.seen
        for tensor, computed in self.seen:
            assert torch.equal(computed, compute(tensor))


class AsObject:
    def __init__(self, statistics):
        self.statistics = statistics

    def __call__(self, module, args, output):
        self.statistics.after(module, args, output)


HOOKS = {
    "forward": lambda m, s: m.register_forward_hook(s.after),
    "forward, first": lambda m, s: m.register_forward_hook(s.after, prepend=True),
    "forward with keywords": lambda m, s: m.register_forward_hook(s.after, with_kwargs=True),
    "forward, always": lambda m, s: m.register_forward_hook(s.after, always_call=True),
    "forward, object": lambda m, s: m.register_forward_hook(AsObject(s)),
    "forward, partial": lambda m, s: m.register_forward_hook(functools.partial(Statistics.after, s)),
    "before": lambda m, s: m.register_forward_pre_hook(s.before),
    "before, first": lambda m, s: m.register_forward_pre_hook(s.before, prepend=True),
    "before with keywords": lambda m, s: m.register_forward_pre_hook(s.before, with_kwargs=True),
}


PLACES = [
    CallOutput("", RELU, calls(5, range(6))),
    CallOutput("", RELU, calls(3, range(6))),
    CallInput("", ADD, calls(2, range(3)), (0,)),
    CallOutput("blocks.0", RELU, calls(0, (0, 1))),
    CallOutput("blocks.1", ADD, calls()),
    CallInput("blocks.1", RELU, calls(1, (0, 1))),
    ModuleOutput("blocks.0.act"),
]


def transformed(model, kind=Scale):
    for number, place in enumerate(PLACES):
        add(model, place, kind(1.5 + number))
    return model


def assert_quiet(caplog):
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
