"""What a forward writes to a buffer through a view is found, whatever else it writes to before."""

import pytest
import torch
from torch import nn

from compress_core.trace import trace


class Cache(nn.Module):
    def __init__(self, other_writes):
        super().__init__()
        self.other_writes = other_writes
        self.register_buffer("cache", torch.zeros(2, 3))

    def forward(self, x):
        y = self.cache * 1
        for _ in range(self.other_writes):
            z = x * 2
            z[0].mul_(2)
        self.cache[0].copy_(x[0])
        return self.cache + y + x


@pytest.mark.parametrize("other_writes", [0, 1, 3])
def test_writes_to_a_buffer_through_a_view_are_attributed_to_it(other_writes):
    (forward,) = trace(Cache(other_writes), torch.randn(2, 3)).forwards
    (write,) = [call for call in forward.calls if call.function.endswith("copy_")]
    changed = [forward.values[value] for value in write.overwritten]
    assert [forward.values[value.before].parameter for value in changed] == ["cache"]
    assert "cache" in {forward.values[value].parameter for value in write.writes}
