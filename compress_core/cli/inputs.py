"""Example inputs on the command line: `[NAME=]SIZES[:DTYPE]`."""

from __future__ import annotations

import re

from compress_core.config.document import InputInfo
from compress_core.errors import UsageError

INPUT_HELP = "shape of an argument of the model's forward, such as 1,3,32,32 or mask=1,16:bool; once for each argument"

_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>\d{1,18}(?:,\d{1,18})*)(?::(?P<dtype>\w+))?")


def info_of(text: str) -> InputInfo:
    """Returns the description of an input.

    Raises:
        UsageError: The text is no shape.
    """
    found = _INPUT.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--input {text}: is no shape; write sizes, such as 1,3,32,32; for a keyword argument put its name before "
            "them, and for a dtype other than float put the dtype after them, such as mask=1,16:bool"
        )
    sizes = [int(size) for size in found["sizes"].split(",")]
    if 0 in sizes:
        raise UsageError(f"--input {text}: sizes have to be at least 1")
    return InputInfo(sample_size=sizes, type=found["dtype"] or "float", keyword=found["name"])
