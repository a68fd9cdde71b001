"""What tests of trace share."""

import torch
from torch import nn

from compress_core.trace import trace


class Function(nn.Module):
    """A model whose forward is a function of it and its arguments."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def forward_of(model, *examples):
    (forward,) = trace(model, list(examples) or torch.ones(2, 4)).forwards
    return forward


def calls(forward):
    """(module, last part of the function's name) of each call."""
    return [(call.module, call.function.rpartition(".")[2]) for call in forward.calls]


def branches(model, x):
    if x.sum().item() > 0:
        return model.positive(x)
    return model.negative(x)


def branching():
    return Function(branches, positive=nn.Linear(4, 3), negative=nn.Linear(4, 3))
