"""Methods of `nn.Module` that a user's class overrides with another signature go on to work."""

import copy
import pickle

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model, register_default_init_args

DATA = [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(n)), 0) for n in range(2)]
SECTIONS = [
    {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3},
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}}},
]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)) + 1)


class Apply(Plain):
    """As ultralytics' models."""

    def _apply(self, fn):
        super()._apply(fn)
        return self


class To(Plain):
    def to(self, device):
        return super().to(device)


class Train(Plain):
    """As models that freeze a part of themselves, and return nothing."""

    def train(self, on=True, *, freeze=True):
        super().train(on)
        if freeze:
            self.norm.eval()


class Names(Plain):
    def named_modules(self, *args, **kwargs):
        yield from super().named_modules(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        yield from super().named_parameters(*args, **kwargs)

    def parameters(self, recurse=True):
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))


class NoArguments(Plain):
    def eval(self):
        return super().train(False)

    def apply(self, function, *more):
        return super().apply(function)


class StateDict(Plain):
    def state_dict(self, *args, prefix="", **kwargs):
        return super().state_dict(*args, prefix=prefix, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict):
        return super().load_state_dict(state_dict)


class Attributes(Plain):
    """As wrappers that look up missing attributes in the module inside."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("conv"), name)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)


class AnyArguments(Plain):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class CallOverridden(Plain):
    def __call__(self, x, *args):
        return super().__call__(x, *args)


KINDS = [Apply, To, Train, Names, NoArguments, StateDict, Attributes, AnyArguments, CallOverridden]


class Inner(nn.Module):
    """Has the overriding module as a part, whose transforms are in it and below it."""

    def __init__(self, kind):
        super().__init__()
        self.part = kind()

    def forward(self, x):
        return self.part(x).softmax(-1)


@pytest.mark.parametrize("inner", [False, True], ids=["model", "part"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_use_it(kind, inner):
    torch.manual_seed(0)
    model = Inner(kind) if inner else kind()
    part = model.part if inner else model
    controller, _ = create_compressed_model(model, register_default_init_args({"compression": SECTIONS}, DATA))
    assert type(part).__mro__[1] is kind or type(part) is kind
    x = DATA[0][0]
    model.train()
    model(x).square().mean().backward()
    model.eval()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), controller.strip()):
        torch.testing.assert_close(twin.eval()(x) if kind is not Train else twin(x), expected, rtol=1e-4, atol=1e-4)
    model.to(torch.device("cpu"))
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    model.float()
    model.load_state_dict(model.state_dict())
    model.apply(lambda module: None)
    modules = [module for _, module in model.named_modules()]
    assert len(modules) == len({id(module) for module in modules})
    assert torch.equal(model(x), expected)
    controller.adapt_batchnorm(DATA)
