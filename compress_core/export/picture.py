"""Draws the difference between a runtime and torch along the graph."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from compress_core.errors import UsageError
from compress_core.export.report import ExportReport, LayerAgreement
from compress_core.pictures import check_format, new_figure, write_figure

_ROUNDING = 0.5  # of a step
_INCHES_PER_LAYER = 0.22
_MOST_NAMES = 200


def draw_layers(report: ExportReport, path: str | os.PathLike[str]) -> None:
    """Draws the error of each quantized tensor, from the first one at the top to the last one.

    Two series, in steps of each quantizer: what the layer alone adds if it is computed from torch's own activations
    (more than half a step is not rounding), and the mean difference that has accumulated up to there.

    Args:
        report: A report with `layers`: of an export with `by_layer=True`, or of one whose outputs differed.
        path: A .png, .svg or .pdf file.

    Raises:
        UsageError: The report has no layers, or the file has another ending.
        ExportError: matplotlib is missing (`pip install 'compress-core[plot]'`).
        FileError: The file cannot be written.
    """
    check_format(path)
    if not report.layers:
        raise UsageError("the report compares no layers; export with by_layer=True")
    layers = report.layers
    figure = new_figure(9, max(3.0, _INCHES_PER_LAYER * min(len(layers), _MOST_NAMES) + 1.5))
    axes = figure.subplots()
    places = range(len(layers))
    highest = max(_finite([layer.steps for layer in layers]), _ROUNDING)
    alone = [layer.steps if math.isfinite(layer.steps) else 2 * highest for layer in layers]
    colors = ["tab:red" if _departs(layer) else "tab:blue" for layer in layers]
    axes.barh(places, alone, color=colors, height=0.7, label="this layer alone, largest (red: more than rounding)")
    known = [(place, layer.accumulated) for place, layer in enumerate(layers) if layer.accumulated is not None]
    axes.plot([mean for _, mean in known], [place for place, _ in known], "k.-", label="accumulated, mean")
    axes.axvline(_ROUNDING, color="gray", linestyle=":", linewidth=1)
    axes.set_yticks(places, [_shortened(layer.place) for layer in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("difference to torch, in steps of the quantizer")
    axes.set_title(f"{Path(report.path).name or 'not written'} in {report.runtime}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    write_figure(figure, path)


def _departs(layer: LayerAgreement) -> bool:
    return not layer.steps <= 1.5 * _ROUNDING


def _finite(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _shortened(place: str) -> str:
    return place if len(place) <= 48 else f"...{place[-45:]}"
