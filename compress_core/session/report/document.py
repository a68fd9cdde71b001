"""The page of a report: its sections, in order, from what was gathered."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compress_core.contract.ledger import Ledger
from compress_core.data.forwards import without_traces
from compress_core.data.ranks import alone
from compress_core.data.rng import RngState
from compress_core.pages import Bars, Block, Code, Details, Figures, Grid, Page, Pairs, Section, Text, write_page
from compress_core.pages.page import check_installed, check_path
from compress_core.session.agreement import refuse_sharded
from compress_core.session.figures import headline, in_words
from compress_core.session.report.bounded import bounded
from compress_core.session.report.gathering import Material, Reported, ReportOptions, gather
from compress_core.session.report.measured import accuracy_steps, evaluated, shown
from compress_core.session.report.network import combined, layers_of, network_blocks
from compress_core.session.report.training import training_blocks


def write_report(reported: Reported, path: str | os.PathLike[str], options: ReportOptions) -> None:
    """Writes the report; see `CompressionController.report`."""
    # Before anything is measured. Other processes may not see the folder in which the first one writes.
    check_path(path, folder=not (dist.is_available() and dist.is_initialized()))
    model = reported.controller.model
    refuse_sharded(model)
    check_installed()
    steps = accuracy_steps(options.accuracy)
    generators = RngState(reported.lifecycle.context.generators())
    try:
        with without_traces(model, parameters=False):
            twin = reported.copy()
            if options.evaluate_fn is not None:  # by every process: it may wait for the others
                steps |= evaluated(options.evaluate_fn, _judged(twin))
            if not _is_first():
                return
            with alone():
                page = _page(gather(twin, steps, options), twin, options)
    finally:
        generators.restore()
    write_page(page, path)


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _judged(twin: Reported) -> dict[str, nn.Module]:
    kept = twin.uncompressed.kept
    found = {} if kept is None else {"uncompressed, measured": kept}
    return {**found, "compressed, measured": twin.controller.model}


def _page(material: Material, twin: Reported, options: ReportOptions) -> Page:
    controller = twin.controller
    name = type(controller.model).__name__
    sections = [
        Section("figures", "Figures", _figures(material)),
        Section("network", "The network", _network(material, controller.model)),
        Section("training", "Training", training_blocks(controller.history)),
        *_of_members(material),
        Section("left-alone", "What was left alone, and why", _left_alone(material)),
        Section("config", "Config, and what it did", _config(twin, material)),
        Section("versions", "Versions", [Pairs(list(_versions(twin)))]),
    ]
    sections = [Section(s.name, s.title, bounded(s.blocks)) for s in sections]
    stages = ", ".join(
        f"{name} ({stage.name.lower().replace('_', ' ')})" for name, stage in controller.compression_stages().items()
    )
    title = f"{name}, compressed" if options.title is None else str(options.title)
    return Page(title, stages or ", ".join(controller.algorithms), sections, f"compress-core {_version()}, {_now()}")


def _figures(material: Material) -> list[Block]:
    steps = material.accuracy
    tiles: list[tuple[str, str, str]] = []
    if steps:
        (first, before), *_, (last, after) = [*steps.items(), *steps.items()]
        tiles.append(("Accuracy", shown(after), f"{last}; {first}: {shown(before)}" if len(steps) > 1 else last))
    blocks: list[Block] = []
    if material.before is not None and material.after is not None:
        tiles += headline(material.before, material.after).figures
        blocks.append(Text(_SIZE))
        if material.file is not None:
            tiles.append(("Size of a file", in_words("size", material.file.size), "with integer weights"))
            blocks.append(Text(_INTEGERS))
    if material.times is not None and material.times.seconds:
        tiles.append(_time_tile(material.times.seconds, rounds=material.file is not None))
        blocks.append(Text(_time_remark(material)))
    if material.difference is not None:
        blocks.append(
            Text(
                "The stripped model was run beside the compressed one on a batch of inputs, in eval mode: "
                + _agreement(material.difference)
            )
        )
    if len(steps) > 1:
        most = max(steps.values())
        blocks.insert(0, Bars("Accuracy by step", ("step", "accuracy"), list(steps.items()), lengths={1: most}))
    remarks = [Text(remark) for remark in material.remarks]
    warning: list[Block] = [Text(f"The model {material.unfinished}.")] if material.unfinished else []
    return [*warning, *([Figures(tiles)] if tiles else []), *blocks, *remarks]


def _agreement(difference: float) -> str:
    if math.isnan(difference):
        return "there is NaN in their outputs, so how far they agree is not known."
    if difference:
        return f"the largest difference of an output is {difference:.1e} of its largest value."
    return "their outputs are the same, bit for bit."


_SIZE = (
    "Parameters, operations (FLOPs of one sample: two for each multiply-accumulate of convolutions and matrix "
    "products) and size are those of what strip() returns, beside the model before compression. Size is what the "
    "parameters take as strip() holds them; zeros take as much as other values."
)
_INTEGERS = (
    "A file for a runtime (controller.export) holds quantized weights as integers: its size is that of the parameters, "
    "with their scales, without the graph."
)


def _time_tile(seconds: Mapping[str, float], *, rounds: bool) -> tuple[str, str, str]:
    value = _milliseconds(seconds["stripped"])
    before = seconds.get("before")
    if before is None:
        return "Time of a forward", value, ""
    ratio = before / seconds["stripped"]
    change = f"{ratio:.3g} times faster" if ratio >= 1 else f"{1 / ratio:.3g} times slower"
    return (
        "Time of a forward, in torch",
        value,
        f"before: {_milliseconds(before)}; {change}{', rounding included' if rounds else ''}",
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _time_remark(material: Material) -> str:
    assert material.times is not None
    assert material.call is not None
    found = material.times
    return (
        f"Time of a forward: median of {found.rounds} forwards of each model in turns, in torch on {found.device} with "
        f"{found.threads} thread{'' if found.threads == 1 else 's'}, on inputs of the shapes {material.call.shapes()} "
        f"({material.call.source}). The model before compression has the weights of today. The stripped model computes "
        "in floating point, zeros and rounding included; integers gain time in a runtime only (controller.export, "
        "compress-core compare)."
    )


def _network(material: Material, model: nn.Module) -> list[Block]:
    columns = combined({name: part.by_layer() for name, part in material.statistics.items()})
    layers = layers_of(model, [name for column in columns for name in column.values])
    return network_blocks(layers, columns, material.forward)


def _of_members(material: Material) -> Iterator[Section]:
    """Yields a section for each algorithm and initializer, in the order in which they worked."""
    names = [*material.statistics, *(name for name in material.measured if name not in material.statistics)]
    for name in names:
        statistics = material.statistics.get(name)
        if isinstance(statistics, Ledger):
            continue
        own = [] if statistics is None else list(statistics.blocks())
        title = name.replace("_", " ").strip()
        yield Section(_anchor(name), title[:1].upper() + title[1:], [*own, *material.measured.get(name, ())])


def _anchor(name: str) -> str:
    return f"of-{re.sub('[^a-zA-Z0-9]+', '-', name)}"


def _left_alone(material: Material) -> list[Block]:
    rows: dict[tuple[str, str], str] = {
        (what, name): reason for name, plan in material.plans.items() for what, reason in plan.skipped.items()
    }
    for name, statistics in material.statistics.items():
        rows |= {(what, name): reason for what, reason in statistics.left_alone().items()}
    if not rows:
        return [Text("Nothing: each algorithm has changed all that it can change.")]
    cells = [(what, by, reason) for (what, by), reason in rows.items()]
    return [Grid("Left as it is", ("what", "by", "because"), cells)]


def _config(twin: Reported, material: Material) -> list[Block]:
    text = json.dumps(twin.lifecycle.context.config.source, indent=2, default=_named, ensure_ascii=False)
    blocks: list[Block] = [Code("The config", text)]
    ledger = twin.controller.ledger
    rows = [(e.path, json.dumps(e.value, default=_named), e.effect, _listed(e.modules)) for e in ledger]
    if rows:
        blocks.append(
            Details(f"What each of its {len(rows)} values did", [Grid("Ledger", _LEDGER, rows)]),
        )
    return blocks


_LEDGER = ("path", "value", "effect", "modules")


def _named(value: Any) -> str:
    """Returns how a value is shown that is not JSON, such as a function."""
    return getattr(value, "__qualname__", type(value).__name__)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _versions(twin: Reported) -> Iterator[tuple[str, str]]:
    yield "compress-core", _version()
    yield "torch", str(torch.__version__)
    yield "Python", platform.python_version()
    for name, origin in twin.lifecycle.origins.items():
        yield name, str(origin)
    yield "written", _now()


def _version() -> str:
    try:
        return metadata.version("compress-core")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return "(not installed)"


def _now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
