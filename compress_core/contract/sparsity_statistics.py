"""Statistics that algorithms of sparsity share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from compress_core.contract.statistics import ByLayer, Statistics, Table
from compress_core.pages import Bars, Block, Details


@dataclass(frozen=True)
class LayerSparsity:
    """The sparsity of one weight.

    Attributes:
        name: Dotted name.
        shape: Its shape.
        weights: Number of elements.
        zeros: Number of masked elements.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int

    @property
    def level(self) -> float:
        """Masked share of the elements."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SparsityStatistics(Statistics):
    """Measured levels of sparsity; a subclass adds fields, their names in `figures`, and a title.

    Attributes:
        layers: The sparsity of each weight.
        model_parameters: Number of parameters of the whole model, including biases and norms, without helpers.
        model_weights: Number of elements of all its weights, including those that are not sparsified.
        skipped: Name of a weight that is not sparsified -> the reason.
    """

    title: ClassVar[str] = "Sparsity"
    # Name of a field -> how the table calls it.
    figures: ClassVar[Mapping[str, str]] = {}

    layers: tuple[LayerSparsity, ...]
    model_parameters: int
    model_weights: int
    skipped: Mapping[str, str]

    @property
    def _zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity_level(self) -> float:
        """Share of the sparsified weights that is masked."""
        weights = sum(layer.weights for layer in self.layers)
        return self._zeros / weights if weights else 0.0

    @property
    def weights_sparsity_level(self) -> float:
        """Share of all weights of the model that is masked."""
        return self._zeros / self.model_weights if self.model_weights else 0.0

    @property
    def model_sparsity_level(self) -> float:
        """Share of all parameters of the model that is masked."""
        return self._zeros / self.model_parameters if self.model_parameters else 0.0

    def tables(self) -> list[Table]:
        """Returns a table of the model, a table of the layers, and one of the weights that are left dense."""
        model = [
            ("level of the sparsified layers", self.sparsity_level),
            ("level of all weights of the model", self.weights_sparsity_level),
            ("level of the whole model", self.model_sparsity_level),
            *((words, _in_words(getattr(self, name))) for name, words in self.figures.items()),
        ]
        total = self.model_weights or 1
        rows = [
            (layer.name, "x".join(map(str, layer.shape)), layer.level, 100 * layer.weights / total)
            for layer in self.layers
        ]
        tables = [
            Table(f"{self.title}: model", ("figure", "value"), model),
            Table(f"{self.title}: layers", ("weight", "shape", "level", "% of weights"), rows),
        ]
        if self.skipped:
            tables.append(Table(f"{self.title}: left dense", ("weight", "because"), list(self.skipped.items())))
        return tables

    def blocks(self) -> list[Block]:
        """Returns what `tables` says, with bars, and without what was left dense: a report has one place for that."""
        found: list[Block] = []
        for table in self.tables():
            if table.title == f"{self.title}: layers":
                bars = Bars(table.title, table.headers, table.rows, shares=(2,), lengths={3: 100.0})
                found.append(Details(f"{len(self.layers)} weights", [bars]))
            elif table.title != f"{self.title}: left dense":
                found.append(table.to_grid())
        return found

    def by_layer(self) -> Sequence[ByLayer]:
        """Returns the masked share of each weight."""
        return [ByLayer("masked", {layer.name: layer.level for layer in self.layers}, "zeros")]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the weights that are left dense."""
        return self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the layers as JSON-able values."""
        return {
            "sparsity_level": self.sparsity_level,
            "weights_sparsity_level": self.weights_sparsity_level,
            "model_sparsity_level": self.model_sparsity_level,
            **{name: getattr(self, name) for name in self.figures},
            "skipped": dict(self.skipped),
            "layers": [{**asdict(layer), "shape": list(layer.shape), "level": layer.level} for layer in self.layers],
        }


def _in_words(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else "none" if value is None else value


@dataclass(frozen=True)
class ScheduledSparsityStatistics(SparsityStatistics):
    """Measured levels of an algorithm whose level follows a schedule.

    Attributes:
        requested_level: Level that was set last.
        target_level: Level at the end of the schedule.
        frozen: Whether the masks are frozen.
    """

    figures: ClassVar[Mapping[str, str]] = {
        "requested_level": "level set last",
        "target_level": "target level",
        "frozen": "masks frozen",
    }

    requested_level: float
    target_level: float
    frozen: bool
