"""The examples of training libraries, each in two processes as its text says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress_core.integrations import read_compression_state
from examples.common.datasets import digits

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
pytest.importorskip("lightning")
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]


def run(folder, *command):
    """Runs a program in a folder of its own; returns what it printed as percentages, and all it printed."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^(trained|compressed, adapted|fine-tuned) +([\d.]+) %$", done.stdout, re.MULTILINE)
    assert "sparsity 80.0%, FULLY_COMPRESSED" in done.stdout
    return {name: float(value) for name, value in found}


def test_transformers(tmp_path):
    printed = run(tmp_path, *TORCHRUN, "examples.train_transformers", "--epochs", "4", "--output", "out", "--bf16")
    assert printed["trained"] > 88 and printed["fine-tuned"] > 88
    plain = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "out" / "plain").eval()
    images, labels = digits().test
    with torch.no_grad():
        correct = (plain(images).logits.argmax(1) == labels).float().mean().item()
    # The file has no quantizers of activations, as transformers has said: another network, and a trained one.
    assert 100 * correct > 88
    convolutions = [m.weight for m in plain.modules() if isinstance(m, torch.nn.Conv2d)]
    zeros = sum(int((weight == 0).sum()) for weight in convolutions) / sum(weight.numel() for weight in convolutions)
    assert zeros > 0.75


def test_lightning(tmp_path):
    printed = run(tmp_path, "-m", "examples.train_lightning", "--epochs", "4", "--devices", "2")
    assert printed["trained"] > 88 and printed["fine-tuned"] > 94
    assert read_compression_state(tmp_path / "lightning_digits.ckpt")["scheduler"]["epoch"] == 3


def test_accelerate(tmp_path):
    options = ["examples.train_accelerate", "--epochs", "4", "--save", "state", "--mixed-precision", "bf16"]
    printed = run(tmp_path, *ACCELERATE, *options)
    assert printed["trained"] > 88 and printed["fine-tuned"] > 94
    resumed = run(tmp_path, "-m", "examples.train_accelerate", "--epochs", "5", "--resume", "state")
    assert resumed["fine-tuned"] > 94 and resumed.keys() == {"fine-tuned"}
