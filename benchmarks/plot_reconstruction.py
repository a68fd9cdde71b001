"""Draws what `benchmarks.reconstruction` measured on ResNet-56, for docs/reconstruction.md.

Usage: python -m benchmarks.plot_reconstruction [--net resnet56] [--samples 256] [--out FOLDER]

Reads benchmarks/results/reconstruction-NET.json and writes a picture with a panel for each kind of compression:
accuracy against how much is compressed. Needs matplotlib: pip install "compress-core[plot]".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import report

# Okabe & Ito's palette, which colour-blind readers can tell apart; marker and line differ as well, for grey prints.
STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "0.45", "marker": "x", "linestyle": ":"},
    "adaptation": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "both": {"color": "#009E73", "marker": "^", "linestyle": "-"},
    "chosen": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}
NAMES = {
    "none": "nothing done",
    "adaptation": "batch norm adapted",
    "both": "weights reconstructed",
    "chosen": "reconstructed, data chooses what goes",
}
# Title of a panel, and what is at each place of its axis: the name of the compression and its label.
PANELS = {
    "Weights that are zero": {f"{level} % sparse": f"{level} %" for level in (50, 80, 90, 95)},
    "Filters: operations before / after": {f"{r}x fewer operations": f"{r}x" for r in (1.5, 2.1, 2.6)},
    "Bits of a weight": {f"{bits}-bit weights": str(bits) for bits in (8, 4, 3, 2)},
}


def curve(rows: list[dict[str, Any]], cases: dict[str, str], variant: str, samples: int) -> list[tuple[int, float]]:
    """Returns place and mean accuracy of a variant for each case that was measured, on most test images."""
    points = []
    for place, case in enumerate(cases):
        found = [row for row in rows if (row["case"], row["variant"]) == (case, variant)]
        found = [row for row in found if row["samples"] == samples]
        if found:
            images = max(row["images"] for row in found)
            points.append((place, statistics.fmean(row["accuracy"] for row in found if row["images"] == images)))
    return points


def draw(net: str, samples: int, out: Path) -> Path:
    """Draws the picture of a network and returns its path."""
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415
    except ImportError:
        sys.exit('matplotlib is missing: pip install "compress-core[plot]"')
    content = json.loads((report.RESULTS / f"reconstruction-{net}.json").read_text())
    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 9, "axes.linewidth": 0.6})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(8.4, 3.3), sharey=True)
    for panel, (title, cases) in zip(axes, PANELS.items(), strict=True):
        panel.axhline(content["fp32"], color="0.35", linestyle=(0, (6, 2)), linewidth=1.0, label="uncompressed")
        for variant, style in STYLES.items():
            points = curve(content["rows"], cases, variant, samples)
            if points:
                places, values = zip(*points, strict=True)
                panel.plot(places, values, label=NAMES[variant], markersize=4, linewidth=1.4, **style)
        panel.set_title(title)
        panel.set_xticks(range(len(cases)), list(cases.values()))
        panel.set_xlim(-0.3, len(cases) - 0.7)
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy in %, before any training")
    axes[0].set_ylim(0, 100)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    path = out / f"reconstruction-{net}.png"
    figure.savefig(path, dpi=160)
    return path


def main() -> None:
    """Draws and prints the path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet56")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    print(draw(options.net, options.samples, options.out))


if __name__ == "__main__":
    main()
