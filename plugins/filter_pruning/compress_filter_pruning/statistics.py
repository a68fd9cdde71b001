"""The statistics of filter pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress_core import ByLayer, Statistics, Table
from compress_core.channels import Certificate
from compress_core.pages import Bars, Block, Details, Grid, Part, Text


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned weight.

    Attributes:
        name: Dotted name of the weight.
        group: Number of the group of its channels.
        filters: Number of filters in the uncompressed model.
        current: Number of filters left.
    """

    name: str
    group: int
    filters: int
    current: int

    @property
    def level(self) -> float:
        """Pruned share of the filters."""
        return 1 - self.current / self.filters


@dataclass(frozen=True)
class Latency:
    """Median time of a forward in eval mode, in seconds, measured alternately on the same inputs.

    Attributes:
        masked: Time of the masked model, which is as large as the uncompressed one.
        shrunk: Time of the stripped model.
        threads: Number of threads.
    """

    masked: float
    shrunk: float
    threads: int


_DIFFERS = "shrunk model differs"


@dataclass(frozen=True)
class LatencyCheck:
    """What a target in time has led to: shares of the time of a forward that are removed.

    Attributes:
        predicted: As the model of the latency says.
        measured: Measured on copies of the full and of the smaller model, in turns; negative if that is slower.
        seconds: Time of the full model: the first quartile, since others make a machine slower and never faster.
        threads: Number of threads.
    """

    predicted: float
    measured: float
    seconds: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as a JSON-able dict."""
        return asdict(self)


Coefficients = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Ranking:
    """What a search has found: the channels with the lowest scores go first, whatever group they are in.

    Attributes:
        coefficients: Name of a weight -> (a, b): a filter of it has the score a * importance + b, and a channel the sum
            of the scores of all filters that produce it.
        tried: Number of rankings that were tried.
        measure: What was measured: `loss`, `error` or `accuracy`, for example.
        value: Its value for the chosen ranking; None if nothing was measured.
        unweighted: Its value for the first ranking of comparison, if that was tried.
    """

    coefficients: dict[str, tuple[float, float]]
    tried: int = 0
    measure: str = ""
    value: float | None = None
    unweighted: float | None = None


@dataclass(frozen=True)
class FilterPruningStatistics(Statistics):
    """Figures of the current model.

    Attributes:
        layers: The pruned layers.
        skipped: Name of a weight -> why its filters are not pruned.
        requested_level: Level that was set last.
        target_level: Level at the end of the schedule.
        counts_flops: Whether these levels are shares of floating point operations, instead of channels.
        full_flops: Floating point operations of the uncompressed model for one sample: two per multiply-accumulate of
            convolutions and matrix products.
        current_flops: The same without the pruned channels.
        full_parameters: Number of parameters of the uncompressed model.
        current_parameters: The same without the pruned channels.
        full_channels: Number of prunable channels in the uncompressed model.
        current_channels: Number of these channels that are left.
        frozen: Whether the masks are frozen.
        certificate: How well the result of the last `strip` or `shrink` agrees with the masked model; None before.
        latency: The last result of `measure_latency`; None before.
        ranking: The ranking that was searched for, or read; None without.
        counts_parameters: Whether the levels are shares of parameters.
        counts_latency: Whether the levels are shares of the measured time of a forward.
        planned_latency: What was predicted and measured at the target when the model was created; None without such a
            target.
        stripped_latency: The same of the last `strip`; None before.
    """

    layers: tuple[PrunedLayer, ...]
    skipped: Mapping[str, str]
    requested_level: float
    target_level: float
    counts_flops: bool
    full_flops: int
    current_flops: int
    full_parameters: int
    current_parameters: int
    full_channels: int
    current_channels: int
    frozen: bool
    certificate: Certificate | None = None
    latency: Latency | None = None
    ranking: Ranking | None = None
    counts_parameters: bool = False
    counts_latency: bool = False
    planned_latency: LatencyCheck | None = None
    stripped_latency: LatencyCheck | None = None

    @property
    def pruning_level(self) -> float:
        """Pruned share of the prunable channels."""
        return 1 - self.current_channels / self.full_channels

    @property
    def flops_pruning_level(self) -> float:
        """Pruned share of the floating point operations."""
        return 1 - self.current_flops / self.full_flops if self.full_flops else 0.0

    @property
    def _unit(self) -> str:
        kinds = {"FLOPs": self.counts_flops, "parameters": self.counts_parameters, "time": self.counts_latency}
        return next((unit for unit, counts in kinds.items() if counts), "channels")

    def tables(self) -> list[Table]:
        """Returns tables of the model, of its state and of the layers."""
        rows: list[tuple[Any, ...]] = [
            ("GFLOPs", self.full_flops / 1e9, self.current_flops / 1e9, self.flops_pruning_level),
            (
                "million parameters",
                self.full_parameters / 1e6,
                self.current_parameters / 1e6,
                1 - self.current_parameters / self.full_parameters,
            ),
            ("channels of pruned groups", self.full_channels, self.current_channels, self.pruning_level),
        ]
        if self.latency is not None:
            masked, shrunk = 1e3 * self.latency.masked, 1e3 * self.latency.shrunk
            rows.append((f"ms for a forward, {self.latency.threads} thread(s)", masked, shrunk, 1 - shrunk / masked))
        for when, check in (("at the target", self.planned_latency), ("of the stripped model", self.stripped_latency)):
            if check is not None:
                full = 1e3 * check.seconds
                label = f"ms for a forward {when}, {check.threads} thread(s)"
                rows.append((f"{label}, predicted", full, full * (1 - check.predicted), check.predicted))
                rows.append((f"{label}, measured", full, full * (1 - check.measured), check.measured))
        state: list[tuple[Any, ...]] = [
            (f"level set last (of {self._unit})", self.requested_level),
            (f"target level (of {self._unit})", self.target_level),
            ("masks frozen", "yes" if self.frozen else "no"),
        ]
        if self.ranking is not None and self.ranking.tried:
            state.append(("rankings tried", self.ranking.tried))
            state.append((f"{self.ranking.measure} of the best ranking, in the search", self.ranking.value))
            if self.ranking.unweighted is not None:
                state.append((f"{self.ranking.measure} of the unweighted ranking", self.ranking.unweighted))
        if self.certificate is not None:
            state.append((f"{_DIFFERS}, eval mode", f"{self.certificate.eval_difference:.1e}"))
            if self.certificate.train_difference is not None:
                state.append((f"{_DIFFERS}, training mode", f"{self.certificate.train_difference:.1e}"))
        layers = [(layer.name, layer.group, layer.filters, layer.current, layer.level) for layer in self.layers]
        found = [
            Table("Filter pruning: model", ("figure", "full", "current", "level"), rows),
            Table("Filter pruning: state", ("figure", "value"), state),
            Table("Filter pruning: layers", ("weight", "group", "filters", "current", "level"), layers),
        ]
        if self.skipped:
            found.append(Table("Filter pruning: left whole", ("weight", "because"), list(self.skipped.items())))
        return found

    def blocks(self) -> list[Block]:
        """Returns the tables of `tables` with bars, and the certificate in words."""
        model, state, layers = self.tables()[:3]
        certificate = [] if self.certificate is None else [Part("Certificate", [Text(_in_words(self.certificate))])]
        return [
            Bars(model.title, model.headers, model.rows, shares=(3,)),
            Grid(state.title, state.headers, [row for row in state.rows if not row[0].startswith(_DIFFERS)]),
            Details(f"{len(self.layers)} weights", [Bars(layers.title, layers.headers, layers.rows, shares=(4,))]),
            *certificate,
        ]

    def by_layer(self) -> Sequence[ByLayer]:
        """Returns the pruned share of each weight's filters."""
        return [ByLayer("filters pruned", {layer.name: layer.level for layer in self.layers}, "pruned")]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the weights whose filters are not pruned."""
        return self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures and the layers as JSON-able values."""
        own = {
            "pruning_level": self.pruning_level,
            "flops_pruning_level": self.flops_pruning_level,
            "layers": [{**asdict(layer), "level": layer.level} for layer in self.layers],
            "skipped": dict(self.skipped),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "latency": None if self.latency is None else asdict(self.latency),
            "planned_latency": None if self.planned_latency is None else self.planned_latency.to_dict(),
            "stripped_latency": None if self.stripped_latency is None else self.stripped_latency.to_dict(),
            "ranking": None if self.ranking is None else asdict(self.ranking),
        }
        rest = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in own}
        return own | rest


def _in_words(certificate: Certificate) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in certificate.inputs)
    trained = certificate.train_difference
    return (
        f"The model without the pruned channels was run beside the masked one, in {certificate.dtype} on inputs of the "
        f"shapes {shapes}. The largest difference of an output, relative to the largest value of that output, was "
        f"{certificate.eval_difference:.1e} in eval mode"
        + (
            "; the model does not run in training mode on these inputs."
            if trained is None
            else f", and {trained:.1e} in training mode without dropout, running statistics included."
        )
    )
