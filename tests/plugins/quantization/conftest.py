"""Fixtures for the tests of the export to ONNX, which are in more than one file."""

from __future__ import annotations

import functools

import pytest


@pytest.fixture(scope="module")
def fast_exporter():
    from torch.onnx._internal.exporter import _registration

    # The exporter parses the source of its 500 operators in each call, which is half of the time of these tests.
    registry = _registration.ONNXRegistry
    original = registry.__dict__["from_torchlib"]
    cached = functools.cache(original.__func__)
    registry.from_torchlib = classmethod(lambda cls, *args, **kwargs: cached(registry, *args, **kwargs))
    yield
    registry.from_torchlib = original


@pytest.fixture
def export(tmp_path):
    from compress_core.export import ExportReport
    from tests.onnx_helpers import File

    def run(controller, args=None, **options) -> tuple[ExportReport, File]:
        report = controller.export_onnx(tmp_path / "model.onnx", args, **options)
        return report, File(tmp_path / "model.onnx")

    return run
