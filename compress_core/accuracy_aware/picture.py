"""Draws rate and accuracy by epoch."""

from __future__ import annotations

import os

from compress_core.accuracy_aware.records import AccuracyAwareStatistics
from compress_core.errors import UsageError
from compress_core.pictures import check_format, new_figure, write_figure


def draw_accuracy_aware(statistics: AccuracyAwareStatistics, path: str | os.PathLike[str]) -> None:
    """Draws metric (above) and rate (below) of each validation, with the lowest metric that is allowed.

    Args:
        statistics: The statistics of a loop that has run.
        path: A .png, .svg or .pdf file.

    Raises:
        UsageError: There are no epochs yet, or the file has another ending.
        ExportError: matplotlib is missing (`pip install 'compress-core[plot]'`).
        FileError: The file cannot be written.
    """
    check_format(path)
    if not statistics.epochs:
        raise UsageError("there are no epochs yet; call run() first")
    records = statistics.epochs
    figure = new_figure(9, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(records))
    measured = [(place, record.metric) for place, record in enumerate(records) if record.metric is not None]
    above.plot([place for place, _ in measured], [metric for _, metric in measured], "k.-", label="compressed model")
    above.axhline(statistics.uncompressed_accuracy, color="tab:blue", label="uncompressed model")
    above.axhline(statistics.minimal_accuracy, color="tab:red", linestyle="--", label="lowest that is allowed")
    above.set_ylabel("metric")
    below.step(places, [record.rate for record in records], "k.-", where="mid", label="measured")
    asked = [(place, record.target_rate) for place, record in enumerate(records) if record.target_rate is not None]
    below.plot([place for place, _ in asked], [rate for _, rate in asked], "_", color="tab:orange", label="asked for")
    below.set(ylabel="compression rate", xlabel="epoch")
    below.set_xticks(places, [str(record.epoch) for record in records], fontsize=7)
    if statistics.result is not None:
        result = records[statistics.result]
        if result.metric is not None:
            above.plot(statistics.result, result.metric, "o", color="tab:green", markersize=9, label="result")
        below.plot(statistics.result, result.rate, "o", color="tab:green", markersize=9, label="result")
    for axes in (above, below):
        axes.legend(fontsize=8)
    write_figure(figure, path)
