"""What tests of channels share."""

import torch
from torch import nn


class Function(nn.Module):
    """Layers by name, and a forward that is given as a function of self and inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args):
        return self._forward(self, *args)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
