"""`compress-core trace`: shows what a model computes, as text or as a picture."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress_core.cli.inputs import INPUT_HELP, info_of
from compress_core.cli.models import MODEL_HELP, load_model
from compress_core.config.document import CompressionConfig, InputInfo
from compress_core.errors import CompressionError, UsageError
from compress_core.trace import Example, Trace, trace
from compress_core.trace.render import LEVELS, Level, counts_text

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_WRITERS: dict[str, Callable[[Trace, Level], str]] = {
    ".svg": lambda found, level: found.to_svg(level),
    ".dot": lambda found, level: found.to_dot(level),
    ".txt": lambda found, level: found.to_text(level) + "\n",
}


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("trace", help="show what a model computes: its function calls or ATen operators")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--config", type=Path, help="a JSON file whose input_info describes the example inputs")
    inputs.add_argument(
        "--input",
        action="append",
        metavar="[NAME=]SIZES[:DTYPE]",
        help=INPUT_HELP,
    )
    parser.add_argument("--level", choices=LEVELS, default="calls", help="what is listed (default: calls)")
    parser.add_argument(
        "-o", "--output", type=Path, help="write this .svg (needs Graphviz), .dot or .txt file instead of printing text"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 0, or 1 after one line on stderr that says what is wrong."""
    try:
        _run(options)
    except CompressionError as error:
        sys.stderr.write(f"compress-core trace: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    output: Path | None = options.output
    if output is not None and output.suffix.lower() not in _WRITERS:
        raise UsageError(f"{output}: cannot write this; the name has to end in {', '.join(_WRITERS)}")
    infos, source = _infos(options)
    # So that output of the model's own code does not end up in the trace.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options.model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        found = trace(model, Example.from_input_info(infos, device, source))
    if output is None:
        sys.stdout.write(found.to_text(options.level) + "\n")
        return
    content = _WRITERS[output.suffix.lower()](found, options.level)
    try:
        output.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from error
    unreached = f"; modules not reached: {', '.join(found.unreached)}" if found.unreached else ""
    sys.stdout.write(f"{output}: {counts_text(found.forwards[0])}{unreached}\n")


def _infos(options: argparse.Namespace) -> tuple[list[InputInfo], str]:
    """Returns descriptions of the inputs, and their source for messages."""
    if options.input:
        return [info_of(text) for text in options.input], "--input"
    if options.config is not None:
        infos = CompressionConfig.from_json(options.config).root.input_info
        infos = [info for info in infos if info.sample_size is not None]
        if infos:
            return infos, "input_info"
        raise UsageError(
            f"{options.config}: has no example input; add input_info, such as "
            '"input_info": {"sample_size": [1, 3, 32, 32]}'
        )
    raise UsageError("there is no example input; give --input, such as --input 1,3,32,32, or --config with input_info")
