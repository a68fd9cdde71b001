"""Files of checkpoints: damaged, foreign, hostile, half written."""

import io
import pickle
import signal
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from compress_core import (
    FileError,
    StateError,
    create_compressed_model,
    read_checkpoint,
    save_checkpoint,
)
from compress_core.session.checkpoint_file import write_summed
from tests.conftest import ROOT
from tests.session.checkpoint_helpers import (
    SPARSITY,
    Net,
    ready,
    refused,
)
from tests.soak import count

# Broken and hostile files.


def test_a_truncated_file_is_refused(saved, tmp_path):
    training, data = ready(saved), saved.read_bytes()
    broken = tmp_path / "broken.pt"
    for length in (0, 1, 100, len(data) // 3, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:length])
        message = refused(broken, training, r"broken.pt' is damaged, or was not written by save_checkpoint")
        assert "Use another checkpoint; do not load it with weights_only=False" in message


def test_any_flipped_bit_is_found(saved, tmp_path):
    """torch itself reads wrong numbers from such a file."""
    data, broken = saved.read_bytes(), tmp_path / "broken.pt"
    places = range(0, len(data), 149)
    wrong = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        broken.write_bytes(changed)
        with pytest.raises(StateError, match=r"there is no checksum at its end|does not have the checksum"):
            read_checkpoint(broken)
        try:
            torch.load(broken, weights_only=True)
            wrong += 1
        except Exception:
            continue
    assert wrong > len(places) / 2


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 1, 6], [9], [0, 8, 1], [7, 2], [1, 8]])
def test_sums_do_not_depend_on_how_it_is_written(sizes):
    from compress_core.session.checkpoint_file import _Summing

    data, file, written = b"content\0\0", io.BytesIO(), 0
    summing = _Summing(file)
    for size in sizes:
        assert summing.write(memoryview(data[written : written + size])) == size
        written += size
    summing.finish()
    comment = f"compress_core crc32 {zlib.crc32(b'content'):08x}".encode()
    assert file.getvalue() == b"content" + bytes([len(comment), 0]) + comment
    with pytest.raises(RuntimeError, match="has not written a ZIP file"):
        _Summing(file).finish()


def test_other_programs_read_the_file(saved):
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"compress_core crc32 ")


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile_files(folder, trap):
    """Files that run code if they are loaded as pickles, and files that are something else."""
    content = {"kind": "compress_core.checkpoint", "format": 1, "extra": Runs(trap)}
    torch.save(content, folder / "code.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(content))
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "state_dict.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("hello")
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    for name, value in (("code", content), ("list", [1, 2]), ("state_dict", nn.Linear(2, 2).state_dict())):
        with (folder / f"{name}_with_sum.pt").open("wb") as file:
            write_summed(file, value)
    return sorted(path for path in folder.iterdir() if path.suffix == ".pt")


def test_foreign_and_hostile_files_run_nothing_and_change_nothing(saved, tmp_path):
    trap = tmp_path / "trap"
    training, files = ready(saved), hostile_files(tmp_path, trap)
    assert len(files) == 11
    for path in files:
        message = refused(path, training, "is damaged, or was not written by save_checkpoint")
        assert str(path) in message
        assert not trap.exists()
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert trap.exists()  # the trap works


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot read '.*none.pt': No such file") as caught:
        read_checkpoint(tmp_path / "none.pt")
    assert isinstance(caught.value, OSError) and caught.value.errno == 2
    with pytest.raises(FileError, match="Is a directory"):
        read_checkpoint(tmp_path)


# Killed while it writes.

WRITER = """
import sys, torch
from torch import nn
from compress_core import create_compressed_model, save_checkpoint
import tests.conftest as conftest
from compress_core.registry import use_registry
with use_registry(conftest.with_built_in_plugins()):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    controller, model = create_compressed_model(model, {"compression": {"algorithm": "magnitude_sparsity"}})
    number = 0
    while True:
        number += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        save_checkpoint(sys.argv[1], controller, number=number)
        print(number, flush=True)
"""


def kill_while_it_writes(path, in_the_middle):
    """Starts a process that saves in a loop, kills it, and returns the number of its last complete save."""
    script = path.parent.parent / "writer.py"
    script.write_text(WRITER)
    places = [ROOT, *(ROOT / "plugins").iterdir()]
    environment = {"PYTHONPATH": ":".join(str(place) for place in places), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    with subprocess.Popen(
        [sys.executable, script, path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        done = int(process.stdout.readline())
        while in_the_middle and not any(size_of(entry) > 1 << 20 for entry in path.parent.glob(".*.part")):
            pass
        process.send_signal(signal.SIGKILL)
        done = max([done, *(int(line) for line in process.stdout.read().splitlines())])
    assert process.returncode == -signal.SIGKILL
    return done


def size_of(path):
    """The size of a file that another process may rename at any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def assert_survives(tmp_path, kills, tried=None):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path, remains = folder / "checkpoint.pt", 0
    for number in range(kills):
        if tried:
            tried.cases += 1
        done = kill_while_it_writes(path, in_the_middle=number % 4 > 0)
        checkpoint = read_checkpoint(path)
        # The last complete one; or the next, if it was killed between the renaming and the message.
        assert checkpoint.extra["number"] in (done, done + 1)
        weights = [checkpoint.model_state[f"{place}.weight"].unique().tolist() for place in (0, 1)]
        assert weights == [[checkpoint.extra["number"]]] * 2
        left = [entry for entry in folder.iterdir() if entry != path]
        assert len(left) <= 1, left
        remains += len(left)
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(path, controller)
    assert list(folder.iterdir()) == [path]  # what the killed ones left is gone
    assert remains > 0  # some of them were killed while a file was half written


def test_a_kill_leaves_the_last_checkpoint(tmp_path):
    assert_survives(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.soak("kills")
def test_many_kills_leave_the_last_checkpoint(tmp_path, tried):
    assert_survives(tmp_path, count(8, 1000), tried)


def test_an_error_of_torch_in_writing_leaves_the_old_file(tmp_path, monkeypatch):
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller, number=1)

    def interrupted(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a.pt", controller, number=2)
    assert read_checkpoint(tmp_path / "a.pt").extra == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    controller, _ = create_compressed_model(Net(), {"compression": SPARSITY})
    save_checkpoint(tmp_path / "a.pt", controller, number=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write '.*a.pt': File too large"):
            save_checkpoint(tmp_path / "a.pt", controller, much=torch.zeros(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(tmp_path / "a.pt").extra == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
