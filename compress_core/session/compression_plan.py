"""`CompressionPlan`: what compression would do to a model, as tables, as JSON and as a page."""

from __future__ import annotations

import html
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress_core.contract.footprint import Footprint, shape_in_words
from compress_core.contract.ledger import Ledger
from compress_core.contract.statistics import Statistics, Table
from compress_core.errors import ExportError
from compress_core.pages import Bars, Block, Details, Page, Section, Text, write_page
from compress_core.session.figures import comparison, headline

# Names that a line of a summary shows.
_SHOWN = 2
# Longer cells take several lines of text.
_WIDTH = 56
_QUOTED = re.compile(r"'[^']*'")
_UNITS_OF_FIGURES = (
    "Operations are floating point operations of one sample: two for each multiply-accumulate of convolutions and "
    "matrix products. Bytes are those that the parameters and their scales take in a file; in ONNX the graph adds "
    "about 300 for each node. Zeros take as much as other values."
)
_UNCHANGED = "nothing yet"


@dataclass(frozen=True)
class PlannedTarget:
    """What an algorithm would do at one of its targets.

    Attributes:
        name: Dotted name, as in its plan.
        at_start: What it does when the model is created; empty if nothing is known of it.
        at_end: What it does at the end of its schedule.
    """

    name: str
    at_start: str
    at_end: str


@dataclass(frozen=True)
class PlannedAlgorithm:
    """What one algorithm would do.

    Attributes:
        name: Its name.
        plugin: The plugin that it comes from.
        stage: Its stage in the pipeline.
        targets: What it would change.
        skipped: Name of what it leaves alone -> why.
        remarks: Sentences: what data will decide, what the figures leave out.
        at_start: The footprint after it, when the model is created.
        at_end: The footprint after it, at the end of the schedules.
    """

    name: str
    plugin: str
    stage: str
    targets: tuple[PlannedTarget, ...]
    skipped: Mapping[str, str]
    remarks: tuple[str, ...]
    at_start: Footprint
    at_end: Footprint

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {
            "name": self.name,
            "plugin": self.plugin,
            "stage": self.stage,
            "targets": [{"name": t.name, "at_start": t.at_start, "at_end": t.at_end} for t in self.targets],
            "left_alone": dict(self.skipped),
            "remarks": list(self.remarks),
            "at_start": self.at_start.to_dict(),
            "at_end": self.at_end.to_dict(),
        }


@dataclass(frozen=True)
class CompressionPlan(Statistics):
    """What `create_compressed_model` would do to a model; returned by `plan_compression`.

    Attributes:
        model: Name of the model's class.
        algorithms: What each algorithm would do, in pipeline order.
        afterwards: Name of an algorithm or correction that the creation runs afterwards -> what it does.
        ledger: What each value of the config does.
        before: The footprint of the model as it is.
        at_start: The footprint after all algorithms, when the model is created.
        at_end: The footprint at the end of the schedules.
    """

    model: str
    algorithms: tuple[PlannedAlgorithm, ...]
    afterwards: Mapping[str, str]
    ledger: Ledger
    before: Footprint
    at_start: Footprint
    at_end: Footprint

    # As text.

    def tables(self, *, complete: bool = False) -> list[Table]:
        """Returns the report as tables.

        Args:
            complete: Whether every target has a line; by default those with the same change share one.
        """
        found = [self._figures()]
        for algorithm in self.algorithms:
            found += _tables_of(algorithm, complete=complete)
        found += self._afterwards()
        return [*found, _config_table(self.ledger)]

    def to_str(self, *, complete: bool = False) -> str:
        """Returns the report as plain text; see `tables`."""
        return "\n\n".join([self.summary(), *(_narrow(table).to_str() for table in self.tables(complete=complete)[1:])])

    def summary(self) -> str:
        """Returns the figures before and after as plain text, with what has to be said about them."""
        return "\n".join([self._figures().to_str(), *(f"  {sentence}" for sentence in self.remarks())])

    def remarks(self) -> list[str]:
        """Returns sentences without which the figures would say too much, each with the algorithm that it is about."""
        own = [f"{a.name}: {sentence}" for a in self.algorithms for sentence in a.remarks]
        unknown = {f"{', '.join(self._open_because(why))}: {why}": None for why in self.at_end.open.values()}
        said = {sentence for a in self.algorithms for sentence in a.remarks}
        return [*own, *(line for line in unknown if line.partition(": ")[2] not in said)]

    def _open_because(self, why: str) -> list[str]:
        return [figure for figure, reason in self.at_end.open.items() if reason == why]

    def _figures(self) -> Table:
        columns = {"now": self.before, "when created": self.at_start, "at the end": self.at_end}
        if self.at_start.figures() == self.at_end.figures():
            columns = {"now": self.before, "compressed": self.at_end}
        return comparison(f"{self.model}: before and after", columns)

    def _afterwards(self) -> list[Table]:
        rows = list(self.afterwards.items())
        return [Table("Runs when the model is created, not in the plan", ("what", "how"), rows)] if rows else []

    # As values.

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {
            "model": self.model,
            "before": self.before.to_dict(),
            "at_start": self.at_start.to_dict(),
            "at_end": self.at_end.to_dict(),
            "algorithms": [algorithm.to_dict() for algorithm in self.algorithms],
            "afterwards": dict(self.afterwards),
            "ledger": self.ledger.to_dict(),
            "parameters": {
                name: {"before": _tensor(self.before, name), "at_start": _tensor(self.at_start, name), "at_end": entry}
                for name, entry in ((name, _tensor(self.at_end, name)) for name in self.at_end.tensors)
            },
        }

    # As a page.

    def to_page(self) -> Page:
        """Returns the report as a page (`compress_core.pages`)."""
        sections = [
            Section(
                "figures",
                "Before and after",
                [
                    headline(self.before, self.at_end),
                    self._figures().to_grid(),
                    *map(Text, self.remarks()),
                    Text(_UNITS_OF_FIGURES),
                    Details("Every parameter", [self._parameters()]),
                ],
            )
        ]
        for number, algorithm in enumerate(self.algorithms):
            blocks: list[Block] = [Text(sentence) for sentence in algorithm.remarks]
            blocks += map(Table.to_grid, _tables_of(algorithm, complete=False))
            if len(algorithm.targets) > 1:
                complete = _tables_of(algorithm, complete=True)
                blocks.append(
                    Details("Every target and what is left alone, one by one", [*map(Table.to_grid, complete)])
                )
            sections.append(Section(f"algorithm-{number}", algorithm.name, blocks))
        sections.append(Section("afterwards", "When the model is created", [*map(Table.to_grid, self._afterwards())]))
        sections.append(Section("config", "The config", [_config_table(self.ledger).to_grid()]))
        names = ", ".join(algorithm.name for algorithm in self.algorithms) or "no algorithm"
        return Page(f"Plan: {self.model}", f"What {names} would do. Nothing has been changed.", sections)

    def _parameters(self) -> Bars:
        """Returns a row for each parameter, the largest first, with the share of its bytes that is left."""
        rows: list[tuple[Any, ...]] = []
        for name, old in self.before.tensors.items():
            new = self.at_end.tensors.get(name)
            if new is None:
                rows.append((name, shape_in_words(old.shape), "replaced", None, None, old.size, None, None))
                continue
            shapes = shape_in_words(old.shape), shape_in_words(new.shape)
            zeros = None if new.is_average else 1 - new.density
            rows.append((name, *shapes, zeros, new.bits, old.size, new.size, _share(new.size, old.size)))
        rows.sort(key=lambda row: -(row[5] or 0))
        headers = ("parameter", "shape", "at the end", "zeros", "bits", "bytes", "at the end", "of the bytes")
        return Bars("Parameters, the largest first", headers, rows, (3, 7))

    def to_html(self) -> str:
        """Returns the page as one HTML document.

        Raises:
            ExportError: jinja2 is missing (`pip install 'compress-core[report]'`).
        """
        return self.to_page().to_html()

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file, completely or not at all.

        Raises:
            ExportError: jinja2 is missing.
            FileError: The file cannot be written.
            UsageError: The path does not end in .html.
        """
        write_page(self.to_page(), path)

    def _repr_html_(self) -> str:
        """Returns the page for notebooks, in a frame of its own; without jinja2 the tables."""
        try:
            page = self.to_html()
        except ExportError:
            return super()._repr_html_()
        return f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 40rem; border: 0"></iframe>'

    def __str__(self) -> str:
        return self.to_str()


def _tables_of(algorithm: PlannedAlgorithm, *, complete: bool) -> list[Table]:
    found = [_changes(algorithm, complete=complete)] if algorithm.targets else []
    if algorithm.skipped:
        title = f"{algorithm.name}: left alone"
        if complete:
            found.append(Table(title, ("what", "because"), list(algorithm.skipped.items())))
        else:
            found.append(Table(title, ("because", "number", "such as"), _reasons(algorithm.skipped)))
    return found


def _reasons(skipped: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Returns a row for each reason; reasons that differ in the names that they quote share one."""
    rows = []
    for words, names in _grouped((_QUOTED.sub("'...'", reason), name) for name, reason in skipped.items()).items():
        given = {skipped[name] for name in names}
        rows.append((given.pop() if len(given) == 1 else words, len(names), _some(names)))
    return rows


def _changes(algorithm: PlannedAlgorithm, *, complete: bool) -> Table:
    """Returns what happens to the targets; with one column if the end is like the start."""
    title = f"{algorithm.name}: would change ({algorithm.plugin})"
    differs = any(target.at_start != target.at_end for target in algorithm.targets)
    headers = ("when created", "at the end") if differs else ("change",)

    def words(target: PlannedTarget) -> tuple[str, ...]:
        return (target.at_start or _UNCHANGED, target.at_end or _UNCHANGED) if differs else (target.at_end or "-",)

    if complete:
        return Table(title, ("what", *headers), [(target.name, *words(target)) for target in algorithm.targets])
    grouped = _grouped((words(target), target.name) for target in algorithm.targets)
    rows = [(*key, len(names), _some(names)) for key, names in grouped.items()]
    return Table(title, (*headers, "number", "such as"), rows)


def _grouped(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _config_table(ledger: Ledger) -> Table:
    return replace(ledger.tables()[0], title="What the config would do")


def _narrow(table: Table) -> Table:
    rows = [[_wrapped(cell) if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return Table(table.title, table.headers, rows)


def _wrapped(text: str) -> str:
    # Dotted names are not broken, so that they can be copied.
    return "\n".join(textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)) or text


def _share(new: int, old: int) -> float | None:
    # Scales may take more than small weights lose; a bar has no more than its whole length.
    return min(new / old, 1.0) if old else None


def _tensor(footprint: Footprint, name: str) -> dict[str, Any] | None:
    found = footprint.tensors.get(name)
    if found is None:
        return None
    density = None if found.is_average else found.density
    return {"shape": list(found.shape), "density": density, "bits": found.bits, "bytes": found.size}
