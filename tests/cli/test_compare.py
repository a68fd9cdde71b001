"""`compress-core compare`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.__main__ import main
from tests.onnx_helpers import create
from tests.zoo import images

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A quantized and a plain file of one network."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    create_compressed_model(model.eval(), {"compression": []})[0].export_onnx(folder / "plain.onnx", images(4))
    create(model).export_onnx(folder / "small.onnx", images(4))
    return folder


def run(capsys, *arguments):
    status = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_files_and_runtimes_stand_side_by_side(files, tmp_path, capsys):
    arguments = (files / "plain.onnx", files / "small.onnx", "--runtime", "onnxruntime", "openvino", "--rounds", 3)
    status, out, _ = run(capsys, *arguments, "--json", tmp_path / "found.json")
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(entry["file"], entry["runtime"].split()[0]) for entry in found] == [
        (file, runtime) for file in ("plain.onnx", "small.onnx") for runtime in ("ONNX", "OpenVINO")
    ]
    assert [entry["integer_share"] for entry in found[:2]] == [0, 0]
    assert found[3]["integer_share"] == 1
    assert [entry["size"] for entry in found[::2]] == [(files / f"{n}.onnx").stat().st_size for n in ("plain", "small")]
    # To the plain file without optimizations: the same numbers up to float32, and more for 8 bits.
    errors = [entry["agreements"][0]["relative_mean"] for entry in found]
    assert max(errors[:2]) < 1e-4 < min(errors[2:]) and max(errors[2:]) < 0.1
    assert found[0]["ratios"]["1"] == [1, 1, 1]
    assert all(entry["milliseconds"]["1"][0] > 0 for entry in found)
    assert "Differences are to the same file" not in out and "Differences are to plain.onnx" in out


def test_real_inputs_are_taken_by_name(files, tmp_path, capsys):
    np.savez(tmp_path / "inputs.npz", input=images(3).numpy())
    status, out, _ = run(capsys, files / "small.onnx", "--inputs", tmp_path / "inputs.npz", "--rounds", 1)
    assert status == 0 and "100.0%" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx"], "'nowhere.onnx' is no file"),
        (["small.onnx", "--runtime", "tflite"], "--runtime tflite: choose of onnxruntime, openvino"),
        (["small.onnx", "--rounds", "0"], "--rounds 0: at least one run has to count"),
        (["small.onnx", "--shape", "pixels=1,3,8,8"], "--shape pixels: the file has no such input; it has input"),
        (["small.onnx", "--shape", "1x3"], "--shape 1x3: write NAME=SIZES"),
        (["small.onnx", "--shape", "input=1,3,9,9"], "ONNX Runtime .* cannot run the file on these inputs"),
        (["broken.onnx"], "ONNX Runtime .* cannot load .*broken.onnx"),
        (["small.onnx", "--inputs", "broken.onnx"], "save arrays by name with numpy.savez"),
        (["small.onnx", "--inputs", "other.npz"], "'input' is missing; it holds pixels"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, files, capsys, monkeypatch):
    import re

    (files / "broken.onnx").write_bytes(b"no model")
    np.savez(files / "other.npz", pixels=images(3).numpy())
    monkeypatch.chdir(files)
    status, out, err = run(capsys, *arguments)
    assert status == 1 and not out
    assert err.count("\n") == 1 and re.search(message, err)


def test_sizes_that_vary_have_to_be_given():
    from compress_core.errors import UsageError
    from compress_core.export.runtimes import Port
    from compress_core.export.side_by_side import example_feeds

    ports = [Port("ids", np.dtype(np.int64), (None, None)), Port("x", np.dtype(np.float32), (None, 3))]
    with pytest.raises(UsageError, match=r"dimension 1 of input 'ids' varies; give one: --shape ids=1,\?"):
        example_feeds(ports, {})
    ids, x = example_feeds(ports, {"ids": [2, 5]})
    assert ids.shape == (2, 5) and ids.dtype == np.int64 and set(np.unique(ids)) <= {0, 1}
    assert x.shape == (1, 3) and x.dtype == np.float32
