"""Command line: compress-core algorithms | choices | schema | check | plan | trace | compare."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from compress_core.api import check_config
from compress_core.cli import compare, plan, trace
from compress_core.contract.statistics import Table
from compress_core.errors import CompressionError, ConfigError
from compress_core.registry import default_registry
from compress_core.registry.schema import json_schema


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; docs/reference/cli.md is made from it."""
    parser = argparse.ArgumentParser(prog="compress-core", description="Model compression for PyTorch training loops.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("algorithms", help="what is installed, from which plugin, and what could not be loaded")
    commands.add_parser("choices", help="the points that plugins can add to, and what is installed for each")
    commands.add_parser("schema", help="print the JSON schema of configs")
    check = commands.add_parser("check", help="say whether a config is valid, and if not, what is wrong and where")
    check.add_argument("config", type=Path, help="path of a JSON file")
    plan.add_parser(commands)
    trace.add_parser(commands)
    compare.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 1 if the command found a problem."""
    options = make_parser().parse_args(arguments)
    if options.command == "algorithms":
        # Plugins that could not be loaded are part of the answer; the log line would only repeat it.
        log = logging.getLogger("compress_core.registry.registry")
        level = log.level
        try:
            log.setLevel(logging.ERROR)
            return _algorithms()
        finally:
            log.setLevel(level)
    if options.command == "choices":
        return _choices()
    if options.command == "schema":
        print(json.dumps(json_schema(default_registry()), indent=2))
        return 0
    run = {"plan": plan.run, "trace": trace.run, "compare": compare.run}.get(options.command)
    return _check(options.config) if run is None else run(options)


def _algorithms() -> int:
    registry = default_registry()
    rows = [
        (kind, name, c.plugin.name, c.plugin.distribution or "-", c.plugin.version or "-")
        for kind, found in (
            ("algorithm", registry.algorithms()),
            ("initializer", {name: [c] for name, c in registry.initializers().items()}),
        )
        for name, contributions in found.items()
        for c in contributions
    ]
    print(Table("Installed", ("kind", "name", "plugin", "distribution", "version"), rows).to_str())
    conflicts = [name for name, found in registry.algorithms().items() if len(found) > 1]
    if conflicts:
        print(f"\nContributed more than once and therefore unusable: {', '.join(conflicts)}", file=sys.stderr)
    for failure in registry.failures:
        print(f"\n{failure.plugin} could not be loaded: {failure.error!r}", file=sys.stderr)
    return 1 if conflicts or registry.failures else 0


def _choices() -> int:
    registry = default_registry()
    for name, point in registry.points().items():
        rows = [(key, str(found.plugin)) for key, found in registry.choices(name).items()]
        print(f"{Table(name, ('choice', 'from'), rows).to_str()}\nA value is {point.description}.\n")
    left_out = [(found.choice.name, str(found.plugin), found.reason) for found in registry.unplaced()]
    if left_out:
        print(Table("Left out", ("choice", "from", "reason"), left_out).to_str())
    return 0


def _check(config: Path) -> int:
    try:
        check_config(config)
    except ConfigError as error:
        print(f"{config}: {len(error.problems)} problem(s)", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        return 1
    except CompressionError as error:
        print(f"{config}: {error}", file=sys.stderr)
        return 1
    print(f"{config}: valid")
    return 0


def console() -> None:
    """Entry point of the installed command; treats a closed pipe (`| head`) as success."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python still holds for the closed pipe must not raise a second time at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    console()
