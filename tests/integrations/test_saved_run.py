"""What the callbacks save, from strangers, and what is said when a library is missing."""

import importlib
import json
import sys

import pytest
import torch

from compress_core import FileError, StateError
from compress_core.integrations import read_compression_state
from compress_core.integrations.saved_run import SavedRun, write_run

RUN = SavedRun({"format": 1, "algorithms": {}}, 2, "")


def test_a_folder_is_written_and_read(tmp_path):
    write_run(tmp_path / "a" / "b", RUN)
    assert read_compression_state(tmp_path / "a" / "b") == RUN.compression_state
    assert json.loads((tmp_path / "a" / "b" / "compression_state.json").read_text())["epochs_before"] == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", '{"compression_state": {}}', '{"epochs_before": 1}', "[" * 5000]
)
def test_other_content_is_refused(tmp_path, content):
    (tmp_path / "compression_state.json").write_text(content)
    with pytest.raises(StateError, match=str(tmp_path)):
        read_compression_state(tmp_path)


@pytest.mark.parametrize("before", [-1, 1.5, "1", True, None])
def test_a_count_that_is_none_is_refused(tmp_path, before):
    (tmp_path / "compression_state.json").write_text(json.dumps({**RUN.to_dict(), "epochs_before": before}))
    with pytest.raises(StateError, match="does not read"):
        read_compression_state(tmp_path)


def test_files_of_lightning(tmp_path):
    torch.save({"compress_core": RUN.to_dict(), "state_dict": {}}, tmp_path / "a.ckpt")
    assert read_compression_state(tmp_path / "a.ckpt") == RUN.compression_state
    with pytest.raises(FileError, match="missing"):
        read_compression_state(tmp_path / "missing.ckpt")
    for content, match in (({"state_dict": {}}, "has no compression state"), ([1], "has no compression state")):
        torch.save(content, tmp_path / "b.ckpt")
        with pytest.raises(StateError, match=match):
            read_compression_state(tmp_path / "b.ckpt")
    torch.save({"compress_core": RUN.to_dict(), "loss": torch.nn.CrossEntropyLoss()}, tmp_path / "c.ckpt")
    with pytest.raises(StateError, match=r"could run code.*weights_only=False"):
        read_compression_state(tmp_path / "c.ckpt")
    for content in (b"", b"hello", (tmp_path / "a.ckpt").read_bytes()[:300]):
        (tmp_path / "d.ckpt").write_bytes(content)
        with pytest.raises(StateError, match=r"d\.ckpt"):
            read_compression_state(tmp_path / "d.ckpt")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(FileError, match="cannot make the folder"):
        write_run(tmp_path / "a", RUN)


@pytest.mark.parametrize("library", ["transformers", "lightning", "accelerate"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library):
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    name = f"compress_core.integrations.{library}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"needs {library} \(.*pip install 'compress-core\[{library}\]'"):
        importlib.import_module(name)
