"""Whether code runs as it is written, or under something that traces, wraps or differentiates it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_plain_execution() -> bool:
    """Tells that nobody traces, wraps or differentiates what is computed now; gradients by autograd aside."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )
