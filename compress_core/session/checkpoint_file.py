"""The file of a checkpoint: what may be in it, how it is written, and how it is read without trusting it."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from compress_core.errors import StateError, UsageError
from compress_core.files import file_error, replaced_file

KIND, FORMAT = "compress_core.checkpoint", 1
_CHUNK = 1 << 22  # bytes that are read at once

# Types that `torch.load(weights_only=True)` takes and that hold nothing else; all others are tried.
_ATOMS = frozenset([bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device])
_TENSORS = frozenset([torch.Tensor, torch.nn.Parameter])

_Dict = InstanceOf[dict]  # type: ignore[type-arg]


class SavedPart(BaseModel):
    """The state of an optimizer or the like."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: str  # name of the class
    state: _Dict
    # Of an optimizer: names and shapes of the parameters of each group, in order; '' if the model does not have it.
    parameters: list[list[tuple[str, list[int]]]] | None


class Content(BaseModel):
    """Everything in a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["compress_core.checkpoint"]
    format: Literal[1]
    version: str  # of compress-core
    model: _Dict  # kept as it is: a `state_dict` has versions of modules in an attribute
    compression_state: _Dict
    parts: dict[str, Annotated[list[SavedPart], Field(min_length=1)]]
    rng: _Dict
    extra: _Dict


def plain(value: Any, place: str) -> Any:
    """Returns a value with all its tensors detached, after checking that it can be loaded without pickle.

    Containers are new, tensors share their memory with the old ones.

    Args:
        value: The value.
        place: What to call it in errors, e.g. `extra['history']`.

    Raises:
        UsageError: Something in it cannot be loaded; names its place and type.
    """
    return _plain(value, place, ())


def _plain(value: Any, place: str, above: tuple[int, ...]) -> Any:
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if kind in _TENSORS:
        return value.detach()
    if id(value) in above:
        raise UsageError(f"{place} contains itself; a checkpoint can hold only finite values")
    above = (*above, id(value))
    if kind in (list, tuple):
        return kind(_plain(item, f"{place}[{number}]", above) for number, item in enumerate(value))
    if kind in (dict, OrderedDict):
        items = {_plain(key, f"a key of {place}", above): key for key in value}
        found = kind((key, _plain(value[old], f"{place}[{old!r}]", above)) for key, old in items.items())
        if kind is OrderedDict:
            vars(found).update(vars(value))
        return found
    return _tried(value, place)


def _tried(value: Any, place: str) -> Any:
    """Returns a value of a type that we do not know, if torch returns the same type after saving it."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        if type(torch.load(file, weights_only=True, map_location="cpu")) is type(value):
            return value
        reason = "comes back as another type"
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
    kind = type(value)
    raise UsageError(
        f"{place} is of type {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold, because loading it "
        "would need pickle, which can run any code. Pass numbers, strings, tensors, or lists and dicts of these: "
        f"float(x) of a NumPy scalar, torch.from_numpy(x) of an array, x.state_dict() of an object ({reason[:200]})"
    )


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a checkpoint completely or not at all.

    Args:
        path: The file.
        content: The fields of `Content`, of values that `plain` returned.

    Raises:
        FileError: It cannot be written; an existing file is as it was.
    """
    with replaced_file(path) as file:
        write_summed(file, {"kind": KIND, "format": FORMAT, "version": _version(), **content})


def write_summed(file: BinaryIO, content: object) -> None:
    """Writes what `torch.save` writes, and the sum of it as the comment that a ZIP file may have at its end.

    torch does not compare the sums of records when it reads them, and a damaged table of contents has none.
    """
    summing = _Summing(file)
    torch.save(content, cast("IO[bytes]", summing))
    summing.finish()


class _Summing:
    """A file that sums up what is written to it, and holds back the last bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held = b""
        self._sum = 0

    def write(self, data: bytes) -> int:
        # The two bytes at the end of a ZIP file are the length of its comment.
        whole = memoryview(data).cast("B")
        if len(whole) >= 2:
            self._write(self._held)
            self._write(whole[:-2])
            self._held = bytes(whole[-2:])
        else:
            joined = self._held + bytes(whole)
            self._write(joined[:-2])
            self._held = joined[-2:]
        return len(whole)

    def _write(self, data: bytes | memoryview) -> None:
        self._sum = zlib.crc32(data, self._sum)
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        if self._held != b"\0\0":
            raise RuntimeError("torch.save() has not written a ZIP file without a comment, as it always did")
        comment = _comment(self._sum)
        self._file.write(len(comment).to_bytes(2, "little") + comment)


def _comment(number: int) -> bytes:
    return f"compress_core crc32 {number:08x}".encode()


def _version() -> str:
    try:
        return metadata.version("compress-core")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def read(path: str | os.PathLike[str], map_location: Any) -> Content:
    """Reads a checkpoint, without running code of the file's.

    Raises:
        FileError: There is no such file, or it cannot be read.
        StateError: It is no checkpoint, damaged, or of another format.
    """
    try:
        with Path(path).open("rb") as file:
            _check_sum(path, file)
            file.seek(0)
            found = _loaded(path, file, map_location)
    except OSError as error:
        raise file_error("cannot read", path, error) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise _not_one(path, "it holds something else")
    if found.get("format") != FORMAT:
        raise StateError(
            f"the checkpoint '{os.fspath(path)}' has the format {found.get('format')!r}, this version reads {FORMAT}; "
            f"load it with the version of compress-core that wrote it ({found.get('version', 'unknown')})"
        )
    try:
        return Content.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _not_one(path, f"{place}: {first['msg']}") from error


def _check_sum(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Compares the contents with their sum: torch reads wrong numbers from a damaged file without a word."""
    length = len(_comment(0))
    left, found = os.fstat(file.fileno()).st_size - length - 2, 0
    while left > 0 and (data := file.read(min(left, _CHUNK))):
        left, found = left - len(data), zlib.crc32(data, found)
    end = file.read(length + 3)
    if end[:2] != length.to_bytes(2, "little") or end[2:-8] != _comment(0)[:-8]:
        raise _not_one(
            path,
            "there is no checksum at its end, so it was cut off, or is something else, such as a state_dict, which is "
            "loaded with model.load_state_dict()",
        )
    if end[2:] != _comment(found):
        raise _not_one(path, "it does not have the checksum that is written at its end")


def _loaded(path: str | os.PathLike[str], file: Any, map_location: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu" if map_location is None else map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        raise _not_one(path, str(error).strip().partition("\n")[0][:300]) from error


def _not_one(path: str | os.PathLike[str], reason: str) -> StateError:
    return StateError(
        f"'{os.fspath(path)}' is damaged, or was not written by save_checkpoint(): {reason.rstrip('.')}. Nothing was "
        "loaded. Use another checkpoint; do not load it with weights_only=False, which runs whatever code is in it"
    )
