"""The files of an export: errors of the disk as errors of the export."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from compress_core.errors import ExportFileError, FileError
from compress_core.files import file_error


@contextlib.contextmanager
def export_errors(path: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """Context manager in which errors of the disk become `ExportFileError`.

    Args:
        path: What is written, for errors that do not say it.
        advice: What else to say about errors that do not say what is written.

    Raises:
        ExportFileError: A file cannot be written; its cause is the error, whose `errno` it has.
    """
    try:
        yield
    except ExportFileError:
        raise
    except OSError as error:
        message = str(error) if isinstance(error, FileError) else f"{file_error('cannot write', path, error)}{advice}"
        raised = ExportFileError(message)
        raised.errno = error.errno
        raise raised from error
