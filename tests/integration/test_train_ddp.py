"""The example for several processes, started by torchrun as its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compress_core import create_compressed_model, read_checkpoint
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy
from examples.train_ddp import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_example_trains_and_its_checkpoint_computes_what_it_printed(world, tmp_path):
    path = tmp_path / "model.pt"
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "examples.train_ddp",
    ]
    command += ["--epochs", "3", "--checkpoint", str(path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = {
        name.strip(): float(value) for name, value in re.findall(r"^(.*?) +([\d.]+) %$", done.stdout, re.MULTILINE)
    }
    assert printed["trained"] > 90
    assert printed["fine-tuned"] > 90
    assert "sparsity 80.0%, FULLY_COMPRESSED" in done.stdout
    checkpoint = read_checkpoint(path)
    controller, model = create_compressed_model(
        demo_network("digits"), CONFIG, compression_state=checkpoint.compression_state
    )
    checkpoint.restore(controller)
    assert accuracy(model.eval(), digits().test) == pytest.approx(printed["fine-tuned"], abs=0.3)
