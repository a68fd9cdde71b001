"""Draws what `benchmarks.bn_adaptation` measured, for docs/adaptation.md.

Usage: python -m benchmarks.plot_bn_adaptation [--results FOLDER] [--out FOLDER]

Reads benchmarks/results/bn_adaptation-*.json and writes a picture for each network: accuracy against the number of
samples, one panel for each compression that was measured. A last picture shows accuracy against the batch size.
Needs matplotlib: pip install "compress-core[plot]".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report

# Okabe & Ito's palette, which colour-blind readers can tell apart; marker and line differ as well, for grey prints.
STYLES = {
    "momentum": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "exact": {"color": "#009E73", "marker": "^", "linestyle": "--"},
    "paired": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}
REFERENCES = {
    "FP32": {"color": "0.35", "linestyle": (0, (6, 2)), "linewidth": 1.0},
    "none": {"color": "0.35", "linestyle": (0, (1, 1.5)), "linewidth": 1.3},
}
FONT: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
SMALLEST_SPAN = 3.0  # points of accuracy: a panel in which nothing happens must not look like one in which much does
COLUMNS = 4
WIDTH = 8.4  # inches


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        x: Numbers of samples, or batch sizes, ascending.
        low: Lower edge of the band, accuracy in %.
        middle: The line.
        high: Upper edge.
    """

    x: list[int]
    low: list[float]
    middle: list[float]
    high: list[float]


def over_samples(rows: list[dict[str, Any]], method: str) -> Curve:
    """Accuracy against the number of samples; the band goes from the worst to the best batch size."""
    by_x: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            by_x.setdefault(row["samples"], []).append(row["mean"])
    return curve(by_x)


def over_batch_sizes(rows: list[dict[str, Any]], method: str, samples: int) -> Curve:
    """Accuracy against the batch size at a fixed number of samples; the band goes over the draws of samples."""
    return curve({r["batch"]: r["draws"] for r in rows if (r["method"], r["samples"]) == (method, samples)})


def curve(by_x: dict[int, list[float]]) -> Curve:
    """Returns lowest, mean and highest of what was found at each x."""
    x = sorted(by_x)
    return Curve(
        x,
        [min(by_x[key]) for key in x],
        [sum(by_x[key]) / len(by_x[key]) for key in x],
        [max(by_x[key]) for key in x],
    )


def pyplot() -> Any:
    """Returns matplotlib.pyplot, drawing to files."""
    try:
        import matplotlib  # noqa: PLC0415
    except ImportError:
        sys.exit('matplotlib is needed to draw pictures: pip install "compress-core[plot]"')
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.rcParams.update(FONT)
    plt.rcParams["figure.facecolor"] = "white"
    return plt


def title_of(net: str, content: dict[str, Any]) -> str:
    """Returns the first line of a picture."""
    kind = content["settings"]["statistics"]
    name = net.removesuffix(f"-{kind}")
    note = "" if kind == "training" else f", statistics of {kind} images"
    return f"{name}{note}"


def small_multiples(
    content: dict[str, Any], curves: Callable[[list[dict[str, Any]], str], Curve], title: str, x_label: str
) -> Any:
    """Returns a figure with a panel for each compression: the estimators, the FP32 model, and no adaptation."""
    results = content["results"]
    columns = min(COLUMNS, len(results))
    lines = math.ceil(len(results) / columns)
    figure, grid = pyplot().subplots(
        lines, columns, figsize=(WIDTH, 1.75 * lines + 1.0), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for place, (case, result) in enumerate(results.items()):
        axes = grid.flat[place]
        panel(axes, {m: curves(result["rows"], m) for m in STYLES}, content["fp32"], result["summary"]["none"])
        axes.set_title(case)
        if place + columns >= len(results):  # nothing below
            axes.set_xlabel(x_label)
        if place % columns == 0:
            axes.set_ylabel("accuracy / %")
    figure.align_ylabels()
    figure.suptitle(title, fontsize=9.5)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5)
    return figure


def panel(axes: Any, curves: dict[str, Curve], fp32: float, none: float) -> None:
    """Draws one compression."""
    for method, found in curves.items():
        style = STYLES[method]
        axes.fill_between(found.x, found.low, found.high, color=style["color"], alpha=0.22, linewidth=0)
        axes.plot(found.x, found.middle, label=method, markersize=3.8, linewidth=1.3, **style)
    axes.axhline(fp32, label="uncompressed (FP32)", zorder=1, **REFERENCES["FP32"])
    axes.axhline(none, label="no adaptation", zorder=1, **REFERENCES["none"])
    ticks = sorted({x for found in curves.values() for x in found.x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    everything = [fp32, none, *(v for found in curves.values() for v in (*found.low, *found.high))]
    axes.set_ylim(*limits(everything))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of the vertical axis."""
    low, high = min(values), max(values)
    missing = max(SMALLEST_SPAN - (high - low), 0.0)
    low -= missing
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def most_batch_sizes(contents: dict[str, dict[str, Any]]) -> tuple[str, int]:
    """Returns the network and the largest number of samples for which most batch sizes were measured."""

    def found(net: str, samples: int) -> int:
        rows = next(iter(contents[net]["results"].values()))["rows"]
        return len({row["batch"] for row in rows if row["samples"] == samples})

    plain = [net for net, content in contents.items() if content["settings"]["statistics"] == "training"]
    pairs = [(net, samples) for net in plain for samples in (64, 256, 2048)]
    return max(pairs, key=lambda pair: (found(*pair), pair[1]))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results by network; those without any case are left out."""
    contents = {
        path.stem.removeprefix("bn_adaptation-"): json.loads(path.read_text())
        for path in sorted(folder.glob("bn_adaptation-*.json"))
    }
    return {net: content for net, content in contents.items() if content["results"]}


def save(figure: Any, path: Path) -> None:
    """Writes a PNG for the width of a page, in few colours: a quarter of the size."""
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415  (matplotlib needs it)

    figure.set_dpi(160)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(64, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Draws all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of bn_adaptation-*.json")
    parser.add_argument("--out", type=Path, default=report.RESULTS.parents[1] / "docs" / "pictures")
    options = parser.parse_args()
    contents = read(options.results)
    if not contents:
        sys.exit(
            f"{options.results}: no bn_adaptation-*.json with results; run python -m benchmarks.bn_adaptation first"
        )
    for net, content in contents.items():
        title = (
            f"{title_of(net, content)}: accuracy after adaptation; line: mean, band: lowest to highest over batch sizes"
        )
        save(
            small_multiples(content, over_samples, title, "calibration samples"),
            options.out / f"bn_adaptation-{net}.png",
        )
    net, samples = most_batch_sizes(contents)
    figure = small_multiples(
        contents[net],
        lambda rows, method: over_batch_sizes(rows, method, samples),
        f"{net}: accuracy after adaptation with {samples} samples; line: mean, band: lowest to highest over draws",
        "samples in a batch",
    )
    save(figure, options.out / "bn_adaptation-batch-size.png")


if __name__ == "__main__":
    main()
