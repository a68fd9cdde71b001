"""The classification script runs from start to end: trained, interrupted, resumed, exported, accuracy-aware."""

import pytest
import torch

from examples import nncf_classification

pytestmark = pytest.mark.slow


def run(folder, *more):
    return nncf_classification.main(["--output", str(folder), "--pretraining", "3", *more])


def test_it_trains_and_resumes_to_the_same_accuracy(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    first = run(tmp_path / "a", "--epochs", "2", "--to-onnx", str(tmp_path / "model.onnx"))
    assert first > 95
    printed = capsys.readouterr().out
    assert "epoch 1: accuracy" in printed and "FULLY_COMPRESSED" in printed
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    run(tmp_path / "b", "--epochs", "1")
    again = run(tmp_path / "b", "--epochs", "2", "--resume", str(tmp_path / "b" / "last.pth"))
    assert again > 95
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True) for name in "ab"]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    masks = [name for name in states[0]["state_dict"] if name.endswith("magnitude_sparsity.mask")]
    kept = [sum(int(state["state_dict"][name].sum()) for name in masks) for state in states]
    assert kept[0] == kept[1]


def test_it_trains_until_the_accuracy_holds(tmp_path, capsys):
    assert run(tmp_path, "--mode", "accuracy_aware") > 95
    assert "Rate and accuracy by epoch" in capsys.readouterr().out
