"""Files appear completely or not at all, under whatever name and with whatever is there already."""

import errno
import os
import stat

import pytest

from compress_core import CompressionError, FileError
from compress_core.files import replaced_file


def write(path, data=b"new"):
    with replaced_file(path) as file:
        file.write(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_new_and_old_files(tmp_path, umask):
    path = tmp_path / "a.bin"
    write(path)
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o640  # as any new file
    for kept in (0o600, 0o644, 0o755):
        path.chmod(kept)
        write(str(path), b"newer")
        assert (path.read_bytes(), mode(path)) == (b"newer", kept)
    assert names(tmp_path) == ["a.bin"]


def test_a_private_file_is_private_while_it_is_written(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o600)
    with replaced_file(tmp_path / "a"):
        (part,) = [entry for entry in tmp_path.iterdir() if entry.name != "a"]
        assert mode(part) == 0o600
        assert (tmp_path / "a").read_bytes() == b"old"


def test_links_stay_and_lead_to_the_new_file(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "link").symlink_to("elsewhere/a")
    for data in (b"one", b"two"):  # first, the link leads nowhere
        write(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (folder / "a").read_bytes() == data
    assert (names(tmp_path), names(folder)) == (["elsewhere", "link"], ["a"])
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError, match=r"cannot write .*loop"):
        write(tmp_path / "loop")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        with pytest.raises(FileError, match=f"cannot write '.*{name}': it exists and is not a file; choose another"):
            write(tmp_path / name)
    with pytest.raises(FileError, match="not a file"):
        write("/dev/null")
    assert names(tmp_path) == ["fifo", "folder"]


@pytest.mark.parametrize(
    ("name", "number", "advice"),
    [
        ("none/a", errno.ENOENT, "; the folder must exist"),
        ("file/a", errno.ENOTDIR, ""),
        ("a" * 256, errno.ENAMETOOLONG, "; choose a shorter name"),
    ],
)
def test_the_cause_is_named(tmp_path, name, number, advice):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError) as caught:
        write(tmp_path / name)
    assert str(caught.value) == f"cannot write '{tmp_path / name}': {os.strerror(number)}{advice}"
    assert caught.value.errno == number
    assert isinstance(caught.value, CompressionError) and isinstance(caught.value, OSError)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "with space and 'quote'", "-x", ".hidden"])
def test_unusual_names(tmp_path, name):
    write(tmp_path / name, b"1")
    write(tmp_path / name, b"2")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"2"


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EIO])
def test_errors_of_the_system_leave_the_old_file(tmp_path, monkeypatch, name, number):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    if name == "replace":
        monkeypatch.setattr("pathlib.Path.replace", failing(number))
    else:
        monkeypatch.setattr(f"compress_core.files.os.{name}", failing(number))
    with pytest.raises(FileError, match=os.strerror(number)) as caught:
        write(path)
    monkeypatch.undo()
    assert caught.value.errno == number
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def test_write_protected_files_and_folders_are_left_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(FileError, match="it is write-protected; choose another path"):
        write(path)
    path.chmod(0o644)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(FileError, match="Permission denied; the folder must be writable"):
            write(path)
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == b"old"


def test_errors_in_the_body_pass_and_leave_nothing(tmp_path):
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replaced_file(tmp_path / "a") as file:
            file.write(b"half")
            raise error
        assert names(tmp_path) == []


def test_a_write_that_failed_is_the_cause_whatever_the_caller_makes_of_it(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(FileError, match="File too large"), replaced_file(tmp_path / "a") as file:
            try:
                for _ in range(64):
                    file.write(b"0" * 4096)
            except OSError as error:
                raise RuntimeError("something went wrong") from error
        with pytest.raises(FileError, match="File too large"):  # small enough for the buffer, which fails at the end
            write(tmp_path / "a", b"0" * ((1 << 16) + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_remains_are_removed_unless_somebody_writes_them(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / ".a.0123456789ab.part").write_bytes(b"of a process that was killed")
    others = [".a.part", ".a.0123.part", ".b.0123456789ab.part", "a.0123456789ab.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    with replaced_file(tmp_path / "a") as slow:
        slow.write(b"slow")
        write(tmp_path / "a", b"fast")
        assert (tmp_path / "a").read_bytes() == b"fast"
    assert (tmp_path / "a").read_bytes() == b"slow"
    assert names(tmp_path) == sorted([*others, "a"])


def test_a_file_that_is_taken_for_remains_before_it_is_locked_is_begun_anew(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, taken = fcntl.flock, []

    def late(descriptor, operation):
        if len(taken) < 3:
            (part,) = tmp_path.iterdir()
            part.unlink()
            taken.append(part.name)
            if len(taken) == 2:
                raise BlockingIOError  # the other process still has it
        lock(descriptor, operation)

    monkeypatch.setattr("compress_core.files.fcntl.flock", late)
    write(tmp_path / "a")
    assert len(set(taken)) == 3
    assert names(tmp_path) == ["a"]


def test_works_where_there_are_no_locks(tmp_path, monkeypatch):
    (tmp_path / ".a.0123456789ab.part").write_bytes(b"perhaps somebody's")
    for replacement in (None, type("NoLocks", (), {"flock": failing(errno.ENOLCK), "LOCK_EX": 1, "LOCK_NB": 2})):
        monkeypatch.setattr("compress_core.files.fcntl", replacement)
        write(tmp_path / "a")
    assert names(tmp_path) == [".a.0123456789ab.part", "a"]


def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_broken_disk_is(tmp_path, monkeypatch):
    flush, folders = os.fsync, []

    def of_folders(number):
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                folders.append(descriptor)
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        return fsync

    monkeypatch.setattr("compress_core.files.os.fsync", of_folders(errno.EINVAL))
    write(tmp_path / "a")
    monkeypatch.setattr("compress_core.files.os.fsync", of_folders(errno.EIO))
    with pytest.raises(FileError, match=r"cannot be sure that it stays on the disk: '.*a': Input/output error"):
        write(tmp_path / "a")
    assert len(folders) == 2
