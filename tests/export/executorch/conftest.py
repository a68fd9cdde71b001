"""Exports for ExecuTorch. One takes seconds, so tests share the programs of a few networks with many outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("executorch")

from compress_core import create_compressed_model

# The grids of XNNPACK on the device CPU: no half range, one scale per activation, quantizers behind layers, too.
SECTION = {
    "algorithm": "quantization",
    "overflow_fix": "disable",
    "quantize_outputs": True,
    "activations": {"per_channel": False},
}


def created(model, data, *more, **section):
    """The controller of a quantized model in eval mode."""
    document = {"target_device": "CPU", "compression": [*more, {**SECTION, **section}]}
    return create_compressed_model(model.eval(), document, init_loader=[data])[0]


class Program:
    """A .pte file in ExecuTorch's runtime."""

    def __init__(self, path: Path):
        from executorch.runtime import Runtime

        self.data = Path(path).read_bytes()
        self.program = Runtime.get().load_program(self.data)

    def __call__(self, *inputs):
        return [entry.clone() for entry in self.program.load_method("forward").execute(list(inputs))]

    def text(self, method):
        return self.program.load_method(method).execute([])[0]
