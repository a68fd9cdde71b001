"""What tests of activation transforms share."""

import torch
from torch import nn

from compress_core import Stage
from compress_core.transforms import (
    ACTIVATION_FUNCTIONS,
    ActivationTransform,
    CallPattern,
    add_activation_transform,
)


class Scale(ActivationTransform):
    def __init__(self, factor=10.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return x * self.factor


class FusedScale(Scale):
    def __init__(self, factor=10.0):
        super().__init__(factor)
        self.taken = []

    fused_activations = frozenset(ACTIVATION_FUNCTIONS)
    fuses_in_place = True

    def fused(self, x, activation):
        self.taken.append(activation)
        return self(ACTIVATION_FUNCTIONS[activation](x))

    def fused_in_place(self, x, activation):
        self.taken.append(activation)
        return self(ACTIVATION_FUNCTIONS[activation](x, inplace=True))


class Function(nn.Module):
    """A model that is one function, with a parameter for the sake of gradients."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, *args):
        return self.function(*args)


def calls(site=0, sites=(0,), training=None):
    return CallPattern(site, tuple(sites), training)


def add(model, place, transform=None, key="q", stage=Stage.PRECISION):
    transform = Scale() if transform is None else transform
    return add_activation_transform(model, place, transform, stage=stage, key=key)
