"""Models whose forward keeps something, each in another place."""

import functools
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

_tables = {}
_calls = 0


class Base(nn.Module):
    """A small network with a batch norm; subclasses keep something in `remember`."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        self.remember(y)
        return self.head(torch.relu(self.last(y)).mean((2, 3)))

    def remember(self, y):
        pass

    def kept(self):
        raise NotImplementedError


class Attribute(Base):
    attention = None

    def remember(self, y):
        self.attention = y.mean((2, 3)).softmax(-1)

    def kept(self):
        return self.__dict__.get("attention")


class DetachedAttribute(Base):
    def __init__(self):
        super().__init__()
        self.attention = None

    def remember(self, y):
        self.attention = y.detach()

    def kept(self):
        return self.attention


class CountingBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def remember(self, y):
        self.calls += 1

    def kept(self):
        return self.calls, self.calls.clone()


class CountingPastAutograd(CountingBuffer):
    def remember(self, y):
        self.calls.data.add_(1)


class AverageBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def remember(self, y):
        self.average = 0.9 * self.average + 0.1 * y.detach().mean()

    def kept(self):
        return self.average, self.average.clone()


class LateBuffer(Base):
    def remember(self, y):
        self.register_buffer("grid", torch.arange(8.0), persistent=False)

    def kept(self):
        return list(self._buffers), set(self._non_persistent_buffers_set)


class LateModule(Base):
    def remember(self, y):
        if "extra" not in self._modules:
            self.extra = nn.Identity()

    def kept(self):
        return list(self._modules)


class NormalizedWeight(Base):
    def remember(self, y):
        with torch.no_grad():
            self.head.bias.clamp_(-0.01, 0.01)

    def kept(self):
        return self.head.bias.detach().clone()


class NormalizedData(NormalizedWeight):
    def remember(self, y):
        self.head.bias.data = self.head.bias.data.clamp(-0.01, 0.01)


class MaxNormEmbedding(Base):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 8, max_norm=0.1)

    def remember(self, y):
        self.embedding(torch.arange(4))

    def kept(self):
        return self.embedding.weight.detach().clone()


class AppendingList(Base):
    def __init__(self):
        super().__init__()
        self.history, self.newest = [], deque([1, 2], maxlen=2)

    def remember(self, y):
        self.history.append(y.detach())
        self.newest.append(3)

    def kept(self):
        return list(self.history), list(self.newest), self.history, self.newest


class FillingDict(Base):
    def __init__(self):
        super().__init__()
        self.grids, self.ordered, self.seen = {"a": 1}, OrderedDict(b=1, a=2), {1}

    def remember(self, y):
        self.grids[tuple(y.shape)] = torch.arange(8.0)
        self.ordered.move_to_end("b")
        self.seen.add(2)

    def kept(self):
        return dict(self.grids), list(self.ordered.items()), set(self.seen), self.grids, self.ordered


class CountingInteger(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def remember(self, y):
        self.calls += 1

    def kept(self):
        return self.calls


class OnSubmodule(Base):
    def remember(self, y):
        self.conv.features = y.detach()

    def kept(self):
        return self.conv.__dict__.get("features")


class Slots:
    __slots__ = ("calls", "table")

    def __init__(self):
        self.calls = 0


@dataclass(frozen=True)
class Frozen:
    grids: dict = field(default_factory=dict)


class InObjects(Base):
    def __init__(self):
        super().__init__()
        self.slots, self.frozen, self.space = Slots(), Frozen(), SimpleNamespace(calls=0, inner=[Slots()])

    def remember(self, y):
        self.slots.calls += 1
        self.slots.table = y.detach()
        self.frozen.grids["a"] = y.detach()
        self.space.calls += 1
        self.space.inner[0].calls += 1

    def kept(self):
        inner = self.space.inner[0].calls
        return self.slots.calls, hasattr(self.slots, "table"), dict(self.frozen.grids), self.space.calls, inner


class InClosure(Base):
    def __init__(self):
        super().__init__()
        calls, table = 0, {}

        def remember(y):
            nonlocal calls
            calls += 1
            table[calls] = y.detach()

        self.remember_inside = remember
        self.kept_inside = lambda: (calls, dict(table))

    def remember(self, y):
        self.remember_inside(y)

    def kept(self):
        return self.kept_inside()


class ClassAttribute(Base):
    grid = None
    grids = {}  # noqa: RUF012 - as users write it

    def remember(self, y):
        type(self).grid = y.detach()
        ClassAttribute.grids["a"] = y.detach()
        Base.latest = y.detach()

    def kept(self):
        return ClassAttribute.__dict__["grid"], dict(ClassAttribute.grids), "latest" in Base.__dict__


class GlobalVariables(Base):
    def remember(self, y):
        global _calls
        _calls += 1
        _tables[_calls] = y.detach()

    def kept(self):
        return _calls, dict(_tables)


@functools.lru_cache
def cached_table(size):
    return torch.arange(float(size))


class CachedFunction(Base):
    def remember(self, y):
        return cached_table(y.shape[-1])

    def kept(self):
        return cached_table(8)


class CachedMethod(Base):
    @functools.lru_cache  # noqa: B019 - as users write it
    def table(self, size):
        return torch.arange(float(size))

    @functools.cached_property
    def positions(self):
        return torch.arange(8.0)

    def remember(self, y):
        return self.table(y.shape[-1]) + self.positions

    def kept(self):
        return self.table(8), "positions" in self.__dict__


class DefaultArgument(Base):
    def remember(self, y, cache={}):  # noqa: B006 - as users write it
        cache["a"] = y.detach()

    def kept(self):
        return dict(DefaultArgument.remember.__defaults__[0])


class FunctionAttribute(Base):
    def remember(self, y):
        FunctionAttribute.remember.calls = getattr(FunctionAttribute.remember, "calls", 0) + 1

    def kept(self):
        return dict(FunctionAttribute.remember.__dict__)


class HiddenModule(Base):
    def __init__(self):
        super().__init__()
        self.hidden = [CountingBuffer(), nn.BatchNorm2d(8)]

    def remember(self, y):
        self.hidden[0].remember(y)
        self.hidden[0].note = 1

    def kept(self):
        return self.hidden[0].calls.clone(), self.hidden[0].__dict__.get("note")


class LooseTensor(Base):
    def __init__(self):
        super().__init__()
        self.calls, self.nested, self.array = torch.zeros(()), {"a": [torch.zeros(2)]}, np.zeros(2)

    def remember(self, y):
        self.calls += 1
        self.nested["a"][0].add_(1)
        self.array += 1

    def kept(self):
        return self.calls, self.calls.clone(), self.nested["a"][0].clone(), self.array.tolist()


class OwnGenerators(Base):
    def __init__(self):
        super().__init__()
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)

    def remember(self, y):
        torch.rand(1, generator=self.torch)
        return self.python.random() + self.numpy.random() + self.old.random()

    def kept(self):
        states = self.python.getstate(), repr(self.numpy.bit_generator.state), self.old.get_state()[1].tolist()
        return self.torch.get_state(), *states


def hooked():
    """A model whose features a hook collects in a list of the user's."""
    model, features = Base(), []
    model.conv.register_forward_hook(lambda module, args, output: features.append(output))
    model.kept = lambda: list(features)
    return model


KINDS = [
    Attribute, DetachedAttribute, CountingBuffer, CountingPastAutograd, AverageBuffer, LateBuffer, LateModule,
    NormalizedWeight, NormalizedData, MaxNormEmbedding, AppendingList, FillingDict, CountingInteger, OnSubmodule,
    InObjects, InClosure, ClassAttribute, GlobalVariables, CachedFunction, CachedMethod, DefaultArgument,
    FunctionAttribute, HiddenModule, LooseTensor, OwnGenerators, hooked,
]  # fmt: skip
RUN_BEFORE = [Attribute, CountingBuffer, LateBuffer, FillingDict, InClosure, ClassAttribute, CachedMethod]
