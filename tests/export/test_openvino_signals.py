"""Ctrl-C after a file has run in OpenVINO."""

import subprocess
import sys
import textwrap

import pytest
from torch import nn

from tests.onnx_helpers import create
from tests.zoo import images

PROGRAM = """
    import signal, sys
    from pathlib import Path
    from compress_core.export.runtimes.openvino import OpenVino

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells have it ignored
    first = OpenVino().load(Path(sys.argv[1]))
    second = OpenVino().load(Path(sys.argv[1]), optimized=False)
    del first
    del second
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_arrives_after_files_were_closed_in_the_order_of_opening(tmp_path):
    pytest.importorskip("openvino")
    create(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).export_onnx(tmp_path / "model.onnx", images(2), verify=False)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "model.onnx")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "interrupted\n"), found.stderr
