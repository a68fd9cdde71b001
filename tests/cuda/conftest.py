"""The device of these tests: CUDA, or what COMPRESS_CORE_TEST_DEVICE says (`cpu` checks the tests themselves)."""

from __future__ import annotations

import os

import pytest
import torch

VARIABLE = "COMPRESS_CORE_TEST_DEVICE"


@pytest.fixture
def device():
    wanted = os.environ.get(VARIABLE) or "cuda"
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device is available here; {VARIABLE}=cpu runs the same tests on the CPU")
    if wanted != "cuda":
        return torch.device(wanted)
    # Convolutions would else be rounded to 10 bits, and compared with those of the CPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(wanted, torch.cuda.current_device())
