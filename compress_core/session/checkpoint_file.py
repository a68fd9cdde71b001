"""The file of a checkpoint: what may be in it, how it is written, and how it is read without trusting it."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError
from torch.serialization import get_crc32_options, set_crc32_options

from compress_core.errors import StateError, UsageError
from compress_core.files import file_error, replaced_file

KIND, FORMAT = "compress_core.checkpoint", 1

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
    sums = get_crc32_options()
    try:
        set_crc32_options(True)  # torch does not look at them when it reads; `read` does
        with replaced_file(path) as file:
            torch.save({"kind": KIND, "format": FORMAT, "version": _version(), **content}, file)
    finally:
        set_crc32_options(sums)


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
            _check_sums(path, file)
            file.seek(0)
            found = _loaded(path, file, map_location)
    except OSError as error:
        raise file_error("cannot read", path, error) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise _not_one(path, "it holds something else; a state_dict alone is loaded with model.load_state_dict()")
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


def _check_sums(path: str | os.PathLike[str], file: Any) -> None:
    """Compares the contents with their checksums: torch reads wrong numbers from a damaged file without a word."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _not_one(path, "its records are compressed")
            damaged = archive.testzip()
    except StateError:
        raise
    except Exception as error:
        # Offsets of a damaged file lead to invalid positions; other errors are those of the disk.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _not_one(path, str(error)) from error
    if damaged is not None:
        raise _not_one(path, f"the record '{damaged}' does not have its checksum")


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
