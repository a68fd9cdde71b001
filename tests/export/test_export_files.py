"""The files of an export: weights in a file of their own, errors of the disk, what is left behind."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compress_core import ExportError, FileError, UsageError, create_compressed_model
from compress_core.export.onnx import files
from tests.onnx_helpers import File, create, session

pytestmark = pytest.mark.usefixtures("fast_exporter")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def controller_of(seed=0):
    return create_compressed_model(network(seed).eval(), {"compression": {"algorithm": "magnitude_sparsity"}})[0]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def check(path, controller):
    (actual,) = session(path, optimized=True).run(None, {"input": X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(actual, controller.model(X).numpy(), rtol=1e-4, atol=1e-6)


def test_weights_in_a_file_of_their_own(tmp_path):
    path, controller = tmp_path / "model.onnx", controller_of()
    report = controller.export_onnx(path, X, external_data=True)
    (data,) = [name for name in names(tmp_path) if name != "model.onnx"]
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", data)
    assert report.data_path == str(tmp_path / data)
    assert report.size == path.stat().st_size + (tmp_path / data).stat().st_size
    assert report.to_str().startswith(f"{path} and {tmp_path / data}: ")
    assert path.stat().st_size < 16_000 < (tmp_path / data).stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    check(path, controller)
    inside = controller_of().export_onnx(tmp_path / "inside.onnx", X)
    ours, theirs = File(path), File(tmp_path / "inside.onnx")
    assert inside.data_path == "" and ours.constants.keys() == theirs.constants.keys()
    assert all(np.array_equal(ours.constants[name], theirs.constants[name]) for name in ours.constants)


def test_the_old_weights_go_and_what_is_not_ours_stays(tmp_path):
    path = tmp_path / "model.onnx"
    for name in ("other.onnx.0123abcd.data", "model.onnx.data", "model.onnx.0123abcg.data"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "model.onnx.0123abcd.data").write_bytes(b"left by an export that was killed")
    kept = set(names(tmp_path)) - {"model.onnx.0123abcd.data"}
    first = controller_of(0).export_onnx(path, X, external_data=True)
    second = controller_of(1).export_onnx(path, X, external_data=True)
    assert first.data_path != second.data_path
    assert set(names(tmp_path)) == {*kept, "model.onnx", Path(second.data_path).name}
    controller_of(1).export_onnx(path, X)
    assert set(names(tmp_path)) == {*kept, "model.onnx"}


@pytest.mark.parametrize("step", ["data", "graph", "after"])
def test_a_kill_at_any_moment_leaves_a_file_that_loads(tmp_path, monkeypatch, step):
    class KilledError(BaseException):
        pass

    path, old, new = tmp_path / "model.onnx", controller_of(0), controller_of(1)
    old.export_onnx(path, X, external_data=True)

    def killed(*args, **kwargs):
        raise KilledError

    if step == "data":
        monkeypatch.setattr(files.shutil, "copyfileobj", killed)
    elif step == "graph":
        # A killed process cleans nothing up.
        monkeypatch.setattr(files.Path, "unlink", lambda *args, **kwargs: None)
        original = files.replaced_file
        monkeypatch.setattr(files, "replaced_file", lambda to: killed() if to == path else original(to))
    else:
        monkeypatch.setattr(files, "_remove_old", killed)
    with pytest.raises(KilledError):
        new.export_onnx(path, X, external_data=True)
    monkeypatch.undo()
    check(path, new if step == "after" else old)
    report = new.export_onnx(path, X, external_data=True)
    assert set(names(tmp_path)) >= {"model.onnx", Path(report.data_path).name}
    check(path, new)


def test_links_and_modes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    target, link = folder / "real.onnx", tmp_path / "link.onnx"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    controller = controller_of()
    report = controller.export_onnx(link, X, external_data=True)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o600
    data = Path(report.data_path)
    assert data.parent == folder and stat.S_IMODE(data.stat().st_mode) == 0o600
    check(target, controller)
    assert "can be read as" in report.notes[0] and str(target) in report.notes[0]
    assert names(tmp_path) == ["folder", "link.onnx"]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_errors_of_the_disk(tmp_path, monkeypatch, external, number):
    """Nothing is left, the old file stays, and both kinds of except clauses catch the error."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("compress_core.files.os.fsync", full)
    with pytest.raises(ExportError, match=rf"cannot write '.*model\.onnx.*{os.strerror(number)}") as caught:
        controller_of().export_onnx(path, X, external_data=external)
    assert isinstance(caught.value, FileError) and caught.value.errno == number
    assert names(tmp_path) == ["model.onnx"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("external", [False, True])
def test_errors_of_temporary_files(tmp_path, monkeypatch, external):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Path, "open" if external else "write_bytes", full)
    with pytest.raises(ExportError, match=r"No space left .*temporary files; .*TMPDIR") as caught:
        controller_of().export_onnx(tmp_path / "model.onnx", X, external_data=external)
    assert caught.value.errno == errno.ENOSPC and not names(tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="it exists and is not a file"):
        controller_of().export_onnx(tmp_path / "model.onnx", X)
    assert stat.S_ISFIFO((tmp_path / "model.onnx").stat().st_mode)


def test_too_large_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST_FILE", files._ROOM + 10_000)
    with pytest.raises(ExportError, match=r"external_data: the model takes .*leave it out"):
        controller_of().export_onnx(tmp_path / "model.onnx", X, external_data=False)
    assert controller_of().export_onnx(tmp_path / "model.onnx", X).data_path
    with pytest.raises(UsageError, match="external_data: 'yes' must be True, False or None"):
        controller_of().export_onnx(tmp_path / "model.onnx", X, external_data="yes")


def test_a_quantized_model_is_compared_by_layer_beside_its_weights(tmp_path):
    from compress_core.export.onnx import layers

    controller = create(network(), [X])
    cuts = []
    original = layers._cut
    try:
        layers._cut = lambda path, feeds: cuts.append(original(path, feeds)) or cuts[-1]
        with pytest.raises(ExportError, match=r"Only roundings add up|agree"):
            controller.export_onnx(tmp_path / "model.onnx", X, external_data=True, tolerance=0)
    finally:
        layers._cut = original
    assert cuts and not names(tmp_path)


def test_metadata_of_a_plugin_survives(tmp_path, monkeypatch):
    """Of the model, the graph, a node and a value; through an older operator set and weights in another file."""

    def rewrite(model):
        model.metadata_props["license"], model.doc_string = "MIT", "a text"
        model.graph.metadata_props["graph"], model.graph.doc_string = "kept", "another"
        for node in model.graph:
            node.metadata_props["seen"], node.doc_string = "yes", "of a node"

    controller = controller_of()
    export = controller._lifecycle.export
    monkeypatch.setattr(controller._lifecycle, "export", lambda *args: [*export(*args), rewrite])
    path = tmp_path / "model.onnx"
    controller.export_onnx(path, X, external_data=True, opset=17)
    file = File(path)
    assert file.metadata["license"] == "MIT" and "compress_core.export" in file.metadata
    assert file.proto.doc_string == "a text" and file.graph.doc_string == "another"
    assert [(entry.key, entry.value) for entry in file.graph.metadata_props] == [("graph", "kept")]
    for node in file.graph.node:
        assert [(entry.key, entry.value) for entry in node.metadata_props] == [("seen", "yes")]
        assert node.doc_string == "of a node"
