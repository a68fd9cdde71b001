"""The statistics of quantization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress_core import ByLayer, Statistics, Table
from compress_core.pages import Block, Details
from compress_quantization.precision.report import PrecisionReport

_GROUPS = ("weights", "activations")


@dataclass(frozen=True)
class QuantizerStatistics:
    """Present settings and range of one quantizer.

    Attributes:
        name: Its name.
        group: `weights` or `activations`.
        bits: Number of bits.
        mode: `symmetric` or `asymmetric`.
        signed: Whether its grid has values below zero.
        per_channel: Whether each channel has its own range.
        enabled: Whether it quantizes.
        low: Smallest value of its grid, over all channels.
        high: Largest value of its grid, over all channels.
        parameter: Dotted name of the weight; empty for activations.
    """

    name: str
    group: str
    bits: int
    mode: str
    signed: bool
    per_channel: bool
    enabled: bool
    low: float
    high: float
    parameter: str = ""


@dataclass(frozen=True)
class QuantizationStatistics(Statistics):
    """All quantizers of a model.

    Attributes:
        quantizers: The quantizers, weights first.
        skipped: A tensor that could be quantized but is not -> the reason.
        potential: Group -> number of quantizers without scopes.
        precision: What the method that chose the numbers of bits has measured; None if there was none.
    """

    quantizers: tuple[QuantizerStatistics, ...]
    skipped: Mapping[str, str]
    potential: Mapping[str, int]
    precision: PrecisionReport | None = None

    def shares(self) -> dict[str, float]:
        """Returns, for each group, the share (0 to 1) of the potential quantizers that exist and are on."""
        on = Counter(quantizer.group for quantizer in self.quantizers if quantizer.enabled)
        return {group: on[group] / number if number else 0.0 for group, number in self.potential.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of quantizers of each kind: figure -> group -> number."""
        rows: dict[str, Counter[str]] = {}
        for quantizer in self.quantizers:
            kinds = (
                "all",
                "enabled" if quantizer.enabled else "disabled",
                quantizer.mode,
                "signed" if quantizer.signed else "unsigned",
                "per channel" if quantizer.per_channel else "per tensor",
                f"{quantizer.bits} bits",
            )
            for kind in kinds:
                rows.setdefault(kind, Counter())[quantizer.group] += 1
        return {kind: {group: count[group] for group in _GROUPS} for kind, count in rows.items()}

    def tables(self) -> list[Table]:
        """Returns tables of the counts, of the quantizers, and of tensors that are not quantized."""
        counts: list[tuple[Any, ...]] = [
            (k, found["weights"], found["activations"]) for k, found in self.counts().items()
        ]
        counts.append(("possible here", *(self.potential[group] for group in _GROUPS)))
        counts.append(("enabled of possible", *(f"{self.shares()[group]:.1%}" for group in _GROUPS)))
        rows = [
            (q.name, q.bits, q.mode, "yes" if q.signed else "no", "yes" if q.per_channel else "no", q.low, q.high)
            for q in self.quantizers
        ]
        tables = [
            Table("Quantization: quantizers", ("kind", "weights", "activations"), counts),
            Table(
                "Quantization: by quantizer",
                ("quantizer", "bits", "mode", "signed", "per channel", "lowest", "highest"),
                rows,
            ),
        ]
        if self.skipped:
            tables.append(Table("Quantization: left as it is", ("tensor", "why"), list(self.skipped.items())))
        return [*tables, *(self.precision.tables() if self.precision is not None else ())]

    def blocks(self) -> list[Block]:
        """Returns the tables of counts and of quantizers, and the frontier of a search for numbers of bits."""
        counts, quantizers = (table.to_grid() for table in self.tables()[:2])
        found: list[Block] = [counts, Details(f"{len(self.quantizers)} quantizers", [quantizers])]
        return [*found, *(self.precision.blocks() if self.precision is not None else ())]

    def by_layer(self) -> Sequence[ByLayer]:
        """Returns the number of bits of each weight that is quantized."""
        bits = {q.parameter: q.bits for q in self.quantizers if q.parameter and q.enabled}
        return [ByLayer("bits", bits, "bits")]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the tensors that could be quantized but are not."""
        return self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as JSON-able values."""
        return {
            "counts": self.counts(),
            "potential": dict(self.potential),
            "shares": self.shares(),
            "quantizers": [asdict(quantizer) for quantizer in self.quantizers],
            "skipped": dict(self.skipped),
            **({} if self.precision is None else {"precision": self.precision.to_dict()}),
        }
