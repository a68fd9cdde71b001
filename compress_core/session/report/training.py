"""The training of a report: what the algorithms measured and the loop said, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress_core.pages import Block, Details, Grid, Panels, Picture, Text, line_svg
from compress_core.session.history import EpochFigures

# More figures are in the table only.
_MOST = 24


def training_blocks(history: Sequence[EpochFigures]) -> list[Block]:
    """Returns a panel for each figure that changed over the epochs, and the table of all.

    Args:
        history: The rows, one before the first epoch and one after each.
    """
    if len(history) < 2:
        return [
            Text(
                "The model has not been trained with this controller: controller.scheduler.epoch_step() before each "
                "epoch records the levels, and controller.log_epoch(loss=...) what only the loop knows."
            )
        ]
    given = list(dict.fromkeys(name for row in history for name in row.given))
    measured = list(dict.fromkeys(name for row in history for name in row.measured))
    changing = [name for name in measured if len({row.measured.get(name) for row in history} - {None}) > 1]
    panels = [_panel(name, history) for name in [*given, *changing][:_MOST]]
    names = [*given, *changing]
    rows = [(row.epochs, row.steps, *(row.values.get(name) for name in names)) for row in history]
    table = Grid("After each epoch", ("epochs", "steps", *names), rows)
    blocks: list[Block] = [Panels(panels)] if panels else [Text("No figure has changed from epoch to epoch.")]
    if not given:
        blocks.append(
            Text("The loss is not known: controller.log_epoch(loss=...) at the end of each epoch records it.")
        )
    return [*blocks, Details(f"{len(history)} rows: the figures after each epoch", [table])]


def _panel(name: str, history: Sequence[EpochFigures]) -> tuple[str, Picture, str]:
    known = [(row.epochs, float(row.values[name])) for row in history if name in row.values]
    finite = [value for _, value in known if math.isfinite(value)]
    first, last = known[0], known[-1]
    remark = f"epoch {first[0]}: {first[1]:.4g}, epoch {last[0]}: {last[1]:.4g}"
    if finite:
        remark += f"; {min(finite):.4g} to {max(finite):.4g}"
    svg = line_svg([epochs for epochs, _ in known], [value for _, value in known])
    return name, Picture(svg, f"{name} over epochs: {remark}"), remark
