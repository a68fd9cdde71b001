"""Exports for tests of the room: models compressed by magnitude sparsity, which is created in no time."""

from __future__ import annotations

import pytest

from compress_core import create_compressed_model
from tests.onnx_helpers import File
from tests.plugins.quantization.conftest import fast_exporter

__all__ = ["fast_exporter"]


@pytest.fixture
def exported(tmp_path):
    """Compresses a model, exports it and returns (report, file)."""

    def run(model, args, **options):
        controller, _ = create_compressed_model(model.eval(), {"compression": {"algorithm": "magnitude_sparsity"}})
        report = controller.export_onnx(tmp_path / "model.onnx", args, **options)
        return report, File(tmp_path / "model.onnx")

    return run
