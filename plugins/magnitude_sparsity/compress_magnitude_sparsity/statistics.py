"""The statistics of magnitude sparsity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress_core import Statistics, Table


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
class MagnitudeSparsityStatistics(Statistics):
    """Measured sparsity levels.

    Attributes:
        layers: The sparsity of each weight.
        model_parameters: Number of parameters of the whole model, including biases and norms.
        requested_level: Level that was set last.
        target_level: Level at the end of the schedule.
        frozen: Whether the masks are frozen.
    """

    layers: tuple[LayerSparsity, ...]
    model_parameters: int
    requested_level: float
    target_level: float
    frozen: bool

    @property
    def sparsity_level(self) -> float:
        """Share of the sparsified weights that is masked."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / weights if weights else 0.0

    @property
    def model_sparsity_level(self) -> float:
        """Share of all parameters of the model that is masked."""
        return sum(layer.zeros for layer in self.layers) / self.model_parameters if self.model_parameters else 0.0

    def tables(self) -> list[Table]:
        """Returns a table of the model and a table of the layers."""
        model = [
            ("level of the sparsified layers", self.sparsity_level),
            ("level of the whole model", self.model_sparsity_level),
            ("level set last", self.requested_level),
            ("target level", self.target_level),
            ("masks frozen", "yes" if self.frozen else "no"),
        ]
        total = sum(layer.weights for layer in self.layers) or 1
        rows = [
            (layer.name, "x".join(map(str, layer.shape)), layer.level, 100 * layer.weights / total)
            for layer in self.layers
        ]
        return [
            Table("Magnitude sparsity: model", ("figure", "value"), model),
            Table("Magnitude sparsity: layers", ("weight", "shape", "level", "% of weights"), rows),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the layers as JSON-able values."""
        return {
            "sparsity_level": self.sparsity_level,
            "model_sparsity_level": self.model_sparsity_level,
            "requested_level": self.requested_level,
            "target_level": self.target_level,
            "frozen": self.frozen,
            "layers": [{**asdict(layer), "shape": list(layer.shape), "level": layer.level} for layer in self.layers],
        }
