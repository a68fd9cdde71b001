"""`compress-core plan`: what compression would do to a model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress_core.api import plan_compression
from compress_core.cli.inputs import INPUT_HELP, info_of
from compress_core.cli.models import MODEL_HELP, load_model
from compress_core.config import CompressionConfig
from compress_core.errors import CompressionError, ConfigError
from compress_core.pages.page import check_path
from compress_core.trace import Example

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "plan", help="show what a config would do to a model: what changes, what stays and why, sizes before and after"
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="path of a JSON file")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--input",
        action="append",
        metavar="[NAME=]SIZES[:DTYPE]",
        help=f"{INPUT_HELP}; by default input_info of the config",
    )
    parser.add_argument("--all", action="store_true", help="give every target a line, instead of one for each change")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plan as a page to this file")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status: 0, or 1 after a line on stderr for each problem."""
    try:
        _run(options)
    except ConfigError as error:
        for problem in error.problems:
            sys.stderr.write(f"compress-core plan: {' '.join(str(problem).split())}\n")
        return 1
    except CompressionError as error:
        sys.stderr.write(f"compress-core plan: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.html is not None:
        check_path(options.html)
    config = CompressionConfig.from_json(options.config)
    infos = [info_of(text) for text in options.input or ()]
    # So that output of the model's own code does not end up in the plan.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(options.model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        example = Example.from_input_info(infos, device, "--input") if infos else None
        plan = plan_compression(model, config, example)
        if options.html is not None:
            plan.write_html(options.html)
    if options.json:
        sys.stdout.write(json.dumps(plan.to_dict(), indent=2) + "\n")
    elif options.html is None or options.all:
        sys.stdout.write(plan.to_str(complete=options.all) + "\n")
    else:
        sys.stdout.write(f"{plan.summary()}\n{options.html}: written\n")
