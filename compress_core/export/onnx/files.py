"""Writes the files of a graph: one, or a second one with the weights, because one holds 2 GB at most."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.errors import ExportError
from compress_core.export.files import export_errors
from compress_core.files import replaced_file

_LARGEST_FILE = 2**31 - 1  # the limit of protobuf
_ROOM = 2**26  # of it for everything but weights
_SMALLEST = 1024  # bytes of a constant; smaller ones stay in the graph
_ALIGNMENT = 4096  # so that runtimes can map the file into memory
_TEMPORARY = " (temporary files; the environment variable TMPDIR names another folder)"


@contextlib.contextmanager
def draft_folder() -> Iterator[Path]:
    """Context manager of a folder for files that are not verified yet."""
    with export_errors("temporary files", _TEMPORARY):
        made = tempfile.TemporaryDirectory()
    with made as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Draft:
    """A graph in a folder for temporary files.

    Attributes:
        file: The graph; not written unless it was asked for.
        data: The file of its weights, with the name that it will have; None if they are in the graph.
    """

    file: Path
    data: Path | None


def drafted(graph: Any, file: Path, name: str, *, external: bool | None, write: bool) -> Draft:
    """Writes a graph for its verification.

    Args:
        graph: An `onnx_ir.Model`; weights that are written to a file of their own are read from there afterwards.
        file: Where to write it.
        name: Name of the file that it becomes.
        external: Whether weights go to a file of their own; None if they have to.
        write: Whether to write the graph, too.

    Raises:
        ExportError: The graph is too large for one file, and `external` is False.
        ExportFileError: A file cannot be written.
    """
    constants = list(_constants(graph))
    total = sum(value.const_value.nbytes for value in constants)
    is_too_large = total > _LARGEST_FILE - _ROOM
    if is_too_large and external is False:
        raise ExportError(
            f"external_data: the model takes {total / 1e9:.1f} GB, and one ONNX file holds 2 GB at most; leave it out"
        )
    with export_errors(file.parent, _TEMPORARY):
        for old in file.parent.glob("*.data"):
            old.unlink()
        data = _externalized(constants, file.parent, name) if external or is_too_large else None
        if write:
            file.write_bytes(serialized(graph))
    return Draft(file, data)


def serialized(graph: Any) -> bytes:
    """Returns the content of a graph's file.

    Raises:
        ExportError: It is too large.
    """
    import onnx_ir  # noqa: PLC0415 - an extra

    proto = onnx_ir.to_proto(graph)
    size = proto.ByteSize()
    if size > _LARGEST_FILE:
        raise ExportError(
            f"the model takes {size / 1e9:.1f} GB beside its weights, and one ONNX file holds 2 GB at most"
        )
    content: bytes = proto.SerializeToString()
    return content


def written(path: Path, graph: Any, data: Path | None) -> tuple[Path | None, int]:
    """Writes a graph, in which nothing is left to do.

    The weights get a name with a digest of them, so that a process that is killed at any moment leaves a graph whose
    weights are there: the old one with the old weights, or the new one with the new ones.

    Args:
        path: The file.
        graph: The graph.
        data: The draft of the file of its weights.

    Returns:
        The file of its weights, and the size of both in bytes.

    Raises:
        ExportFileError: A file cannot be written. What was there is as it was.
    """
    with export_errors(path):
        target = path.resolve()
        content = serialized(graph)
        beside = None if data is None else target.with_name(data.name)
        is_new = beside is not None and not beside.exists()
        try:
            if beside is not None and data is not None:
                _copy(data, beside, target)
            with replaced_file(path) as file:
                file.write(content)
        except BaseException:
            if beside is not None and is_new:
                beside.unlink(missing_ok=True)
            raise
        _remove_old(target, beside)
        return beside, len(content) + (0 if beside is None else beside.stat().st_size)


def _constants(graph: Any) -> Iterator[Any]:
    for part in (graph.graph, *graph.graph.subgraphs()):
        yield from (value for value in part.initializers.values() if value.const_value is not None)


def _externalized(constants: list[Any], folder: Path, name: str) -> Path:
    """Writes constants to a file, from which they are read from now on."""
    import onnx_ir  # noqa: PLC0415 - an extra

    digest, draft, places = hashlib.sha256(), folder / "weights", []
    with draft.open("wb") as file:
        for value in constants:
            tensor = value.const_value
            if tensor.nbytes < _SMALLEST:
                continue
            padding = b"\0" * (-file.tell() % _ALIGNMENT)
            places.append((value, file.tell() + len(padding), tensor.nbytes))
            content = tensor.tobytes()
            for part in (padding, content):
                digest.update(part)
                file.write(part)
    data = draft.rename(folder / f"{name}.{digest.hexdigest()[:8]}.data")
    for value, offset, length in places:
        tensor = value.const_value
        value.const_value = onnx_ir.ExternalTensor(
            data.name,
            offset,
            length,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name,
            doc_string=tensor.doc_string,
            base_dir=folder,
        )
    return data


def _copy(draft: Path, to: Path, target: Path) -> None:
    mode = target.stat().st_mode & 0o777 if target.is_file() else None
    with draft.open("rb") as source, replaced_file(to) as file:
        shutil.copyfileobj(source, file)
    if mode is not None:  # as readable as the graph
        to.chmod(mode)


def _remove_old(target: Path, kept: Path | None) -> None:
    """Removes the weights of the graph that was replaced, and those of exports that were killed."""
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    for entry in target.parent.iterdir():
        if pattern.fullmatch(entry.name) and entry != kept and entry.is_file() and not entry.is_symlink():
            with contextlib.suppress(OSError):  # somebody else's
                entry.unlink()
