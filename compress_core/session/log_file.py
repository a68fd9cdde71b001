"""A CSV file of figures, a line for each moment of a training, which goes on where a resumed training does."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress_core.errors import UsageError
from compress_core.files import file_error, replaced_file
from compress_core.session.history import Number

Moment = tuple[int, int]

_MOMENT = ("epochs", "steps")


class CsvFile:
    """A CSV file with the columns `epochs`, `steps`, and one for each figure.

    A line is added by one write to the end of the file, so a process that is killed leaves whole lines, and at most the
    beginning of one more, which the next write removes. A figure that comes later gets a new column at the end: then
    the file is replaced as a whole, as it is where lines have to go because the training was taken back.

    Args:
        path: The file; its folder must exist.
        begins: Whether a training begins, whose figures do not belong behind others.

    Raises:
        UsageError: The file has something else in it, or `begins`, and it has figures already.
        FileError: The file cannot be read, or its folder does not exist.
    """

    def __init__(self, path: Path, *, begins: bool = False) -> None:
        self.path = path.absolute()  # whoever changes the folder later does not mean the log
        self._columns: list[str] = []
        self._size = 0
        self._last: Moment | None = None
        if not self.path.parent.is_dir():  # else the first epoch would find out
            raise file_error("cannot write", path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
        rows = self._read()
        if begins and rows:
            raise UsageError(
                f"log_to: '{path}' has figures of a training that went on to epoch {max(rows)[0]}, and this one is at "
                "its beginning. To go on with that one, restore its checkpoint first; otherwise remove the file, or "
                "name another one"
            )

    def write(self, moment: Moment, values: Mapping[str, Number]) -> None:
        """Adds a line; later moments, which a training has had before it was taken back, are removed.

        Args:
            moment: Number of epochs and of optimizer steps. Values of a moment that has a line are added to it.
            values: The figures by name.

        Raises:
            FileError: The file cannot be written.
            UsageError: Somebody else has written to it, such as another training at the same time.
        """
        if self._size_now() != self._size:
            last = self._last
            self._refuse_others(self._read(), last, moment, values)
        is_new = self._last is not None and moment > self._last
        if is_new and all(name in self._columns for name in values):
            self._append(self._line(moment, values))
        else:
            self._replace(moment, values)
        self._last = moment

    def _refuse_others(
        self,
        rows: Mapping[Moment, Mapping[str, str]],
        last: Moment | None,
        moment: Moment,
        values: Mapping[str, Number],
    ) -> None:
        """Raises UsageError if lines have come since the last one that was written here; the same figures may have."""
        new = {at: row for at, row in rows.items() if last is None or at > last}
        same = new.pop(moment, {})
        if new or any(same.get(name, repr(value)) != repr(value) for name, value in values.items()):
            self._last = last  # so that the next figures are refused as well
            self._size = -1
            raise UsageError(
                f"log_to: '{self.path}' has figures of another training that were written since this one wrote to it; "
                "give each training a file of its own"
            )

    def _replace(self, moment: Moment, values: Mapping[str, Number]) -> None:
        rows = {earlier: row for earlier, row in self._read().items() if earlier <= moment}
        texts = {name: repr(value) for name, value in values.items()}
        rows[moment] = {**rows.get(moment, {}), **texts}
        self._columns = list(dict.fromkeys([*self._columns, *values]))
        lines = [_text([*_MOMENT, *self._columns])]
        lines += [_text([*map(str, at), *(row.get(name, "") for name in self._columns)]) for at, row in rows.items()]
        content = "".join(lines).encode()
        with replaced_file(self.path) as file:
            file.write(content)
        self._size = len(content)

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("r+b") as file:
                file.truncate(self._size)  # without what a killed process, or a full disk, has left of a line
                file.seek(self._size)
                file.write(line)
        except OSError as error:
            raise file_error("cannot write", self.path, error) from error
        self._size += len(line)

    def _line(self, moment: Moment, values: Mapping[str, Number]) -> bytes:
        cells = [repr(values[name]) if name in values else "" for name in self._columns]
        return _text([*map(str, moment), *cells]).encode()

    def _size_now(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise file_error("cannot read", self.path, error) from error

    def _read(self) -> dict[Moment, dict[str, str]]:
        """Reads columns and whole lines; notes how far these go."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise file_error("cannot read", self.path, error) from error
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *lines = csv.reader(io.StringIO(whole.decode(), newline=""), strict=True) if whole else [[*_MOMENT]]
            rows = dict(_parsed(header, line) for line in lines)
        except (ValueError, csv.Error) as error:
            raise self._foreign(str(error)) from error
        if tuple(header[:2]) != _MOMENT or (content and not whole):
            raise self._foreign(f"it does not begin with {','.join(_MOMENT)}")
        self._columns, self._size, self._last = header[2:], len(whole), max(rows, default=None)
        return rows

    def _foreign(self, why: str) -> UsageError:
        return UsageError(f"log_to: '{self.path}' is no file that log_to has written ({why}); name another one")


def _parsed(header: Sequence[str], line: Sequence[str]) -> tuple[Moment, dict[str, str]]:
    if len(line) != len(header):
        raise ValueError(f"a line has {len(line)} entries, and the first one {len(header)}")
    cells = {name: cell for name, cell in zip(header[2:], line[2:], strict=True) if cell}
    for cell in cells.values():
        float(cell)
    return (int(line[0]), int(line[1])), cells


def _text(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
