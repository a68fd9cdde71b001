"""Writes files completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from compress_core.errors import FileError

try:
    import fcntl
except ImportError:  # Windows: remains of a killed process stay there
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".part"
# What file systems answer that cannot flush folders.
_NO_FLUSH = frozenset([errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EISDIR])


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager that writes a file: it appears under its name when it is complete and on the disk.

    The file is written under another name in the same folder and renamed at the end, so a process that is killed in
    the meantime leaves the old file. What such a process leaves besides is removed by the next one that writes there.
    An existing file keeps its permissions; a symbolic link stays, and the file it leads to is replaced.

    Args:
        path: The file. Its folder must exist.

    Yields:
        A file to write bytes to.

    Raises:
        FileError: The file cannot be written, or the path leads to something that is not a file. The old file, if
            any, is as it was.
    """
    try:
        target = Path(path).resolve()
        mode = _mode_of(target)
        _remove_remains(target)
        part, file = _opened_part(target, mode)
    except (OSError, RuntimeError) as error:  # a loop of symbolic links is a RuntimeError until Python 3.12
        raise file_error("cannot write", path, error) from error
    noting = _NotingErrors(file)
    try:
        try:
            yield cast("BinaryIO", noting)
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                part.chmod(mode)
            part.replace(target)
        except Exception as error:
            # torch reports a write that failed as an error of its own, without the cause.
            cause = noting.error or error
            if isinstance(cause, OSError):
                raise file_error("cannot write", path, cause) from error
            raise
    except BaseException:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is still in the buffer of a full disk
            file.close()
        raise
    file.close()
    _flush_folder(path, target.parent)


def file_error(what: str, path: str | os.PathLike[str], cause: BaseException) -> FileError:
    """Returns the error that says what failed, of which file, and why."""
    number = getattr(cause, "errno", None)
    reason = getattr(cause, "strerror", None) or str(cause)
    advice = _ADVICE.get(number, "") if number and reason == os.strerror(number) else ""
    error = FileError(f"{what} '{os.fspath(path)}': {reason}{advice}")
    error.errno = number
    return error


_ADVICE = {
    errno.ENOENT: "; the folder must exist",
    errno.ENOSPC: "; free some space, or choose another folder",
    errno.EDQUOT: "; free some space, or choose another folder",
    errno.EACCES: "; the folder must be writable, too, because files are replaced as a whole",
    errno.EPERM: "; the folder must be writable, too, because files are replaced as a whole",
    errno.EROFS: "; choose another folder",
    errno.ENAMETOOLONG: "; choose a shorter name",
}


def _mode_of(target: Path) -> int | None:
    """Returns the permissions of a file; None if it does not exist."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it exists and is not a file; choose another path")
    if not os.access(target, os.W_OK):  # renaming would get past what its owner has write-protected
        raise OSError(errno.EACCES, "it is write-protected; choose another path")
    return stat.S_IMODE(mode)


def _beginning(target: Path) -> str:
    # Of a fixed length, so that every name that is allowed for the file leaves room for the rest.
    return f".{os.fsencode(target.name)[:200].decode('ascii', 'replace').replace(chr(0xFFFD), '_')}."


def _opened_part(target: Path, mode: int | None) -> tuple[Path, IO[bytes]]:
    if len(os.fsencode(target.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    while True:
        part = target.with_name(f"{_beginning(target)}{secrets.token_hex(6)}{_SUFFIX}")
        # Never more readable than the file that it becomes; with the umask, as any new file.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(part, flags, 0o666 if mode is None else mode & 0o666 | stat.S_IWUSR)
        except FileExistsError:
            continue
        if _lock(descriptor) is False or not os.fstat(descriptor).st_nlink:  # taken for remains before it was locked
            os.close(descriptor)
            continue
        return part, os.fdopen(descriptor, "wb")


def _remove_remains(target: Path) -> None:
    """Removes what processes that were killed have left: nobody holds a lock on it."""
    beginning = _beginning(target)
    for entry in target.parent.iterdir():
        rest = entry.name.removeprefix(beginning).removesuffix(_SUFFIX)
        if entry.name != f"{beginning}{rest}{_SUFFIX}" or len(rest) != 12 or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):  # somebody else's, or removed by another process in the meantime
            descriptor = os.open(entry, os.O_RDWR | os.O_NONBLOCK)
            try:
                if _lock(descriptor):
                    entry.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks a file until it is closed or this process ends.

    Returns:
        False if another process has locked it, None if there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _flush_folder(path: str | os.PathLike[str], folder: Path) -> None:
    """Makes the new name survive a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise file_error("cannot be sure that it stays on the disk:", path, error) from error


class _NotingErrors:
    """A file that keeps the error of a write that failed, and is not written to any more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
