"""Writes while a forward waits are the algorithm's and stay; writes by the forward itself are undone."""

import torch
from torch import nn

from compress_core.data.forwards import running, without_traces, writing


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))


def test_writes_in_between_stay_and_those_of_the_forward_do_not():
    net = Net()
    with torch.no_grad(), without_traces(net), running(net):
        net.calls.add_(1)  # as a forward does
        net.other.weight.zero_()
        with writing():
            net.fc.weight.fill_(3)
        net.calls.add_(1)
    assert bool((net.fc.weight == 3).all())
    assert not bool((net.other.weight == 0).any())
    assert net.calls == 0
