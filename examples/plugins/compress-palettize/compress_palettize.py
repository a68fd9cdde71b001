"""Palettization for compress-core: each weight is an entry of a small table that its layer trains."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    Clock,
    ConfigError,
    Context,
    Plan,
    Stage,
    Table,
    TableStatistics,
    hookimpl,
)
from compress_core.transforms import WeightTransform, add_weight_transform, get_weight_transform, raw_parameter

_ROUNDS = 100


def kmeans(values: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the means of k-means in one dimension (Lloyd), begun at quantiles: float64, ascending."""
    ordered = values.detach().double().flatten().sort().values
    distinct = torch.cat([ordered[:1], ordered[1:][ordered.diff() != 0]])
    if len(distinct) <= count:
        last = distinct[-1:] if len(distinct) else ordered.new_zeros(1)
        return torch.cat([distinct, last.expand(count - len(distinct))])
    ends = torch.tensor([0, len(ordered)], device=ordered.device)
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    means = ordered[((torch.arange(count, device=ordered.device) + 0.5) * len(ordered) / count).long()]
    for _ in range(_ROUNDS):
        edges = torch.cat([ends[:1], torch.searchsorted(ordered, (means[1:] + means[:-1]) / 2), ends[1:]])
        sizes = edges.diff()
        renewed = torch.where(sizes > 0, sums[edges].diff() / sizes.clamp(min=1), means)
        if torch.equal(renewed, means):
            break
        means = renewed
    return means


class Palette(WeightTransform):
    """Maps a weight to the entries that its elements have been assigned to; what is zero stays zero.

    The codebook gets the sum of its elements' gradients, the stored weight gets them unchanged (straight-through), so
    that a later assignment can differ. Zeros are those of masks and pruned channels, which stand before.

    Attributes:
        codebook: Trained, of shape (entries,).
        indices: The entry of each element, in the weight's shape.
    """

    recomputable = True
    follows: ClassVar = {"codebook": "fixed", "indices": "weight"}

    indices: torch.Tensor

    def __init__(self, weight: torch.Tensor, entries: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(kmeans(weight[weight != 0], entries).to(weight.dtype))
        self.register_buffer("indices", torch.zeros_like(weight, dtype=torch.uint8))
        self.assign(weight)

    def assign(self, weight: torch.Tensor) -> None:
        """Assigns each element to the nearest entry."""
        ordered, order = self.codebook.detach().sort()
        self.indices.copy_(order[torch.bucketize(weight.detach(), (ordered[1:] + ordered[:-1]) / 2)])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the entries."""
        entries = self.codebook[self.indices.long()] * (weight != 0)
        return entries + (weight - weight.detach())  # plus zero, with a gradient


class PalettizeConfig(AlgorithmConfig):
    """Section of the algorithm `palettize`."""

    algorithm: Literal["palettize"] = Field(description="name of the algorithm")
    bits: int = Field(4, ge=1, le=8, description="a layer's codebook has 2^bits entries")
    reassign_epochs: int = Field(0, ge=0, description="epochs at whose beginning weights choose their entry anew")


class Palettize(Algorithm):
    """Weight sharing by k-means (Han et al. 2016, arXiv:1510.00149), with trained codebooks."""

    name = "palettize"
    Config = PalettizeConfig
    stage = Stage.PRECISION
    reads_later = ("reassign_epochs",)

    config: PalettizeConfig
    _targets: tuple[str, ...] = ()

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses to share weights with quantization: both say which values a weight may have."""
        if any(getattr(section, "algorithm", "") == "quantization" for section in context.sections):
            raise ConfigError(
                "the config has a section 'quantization' as well, which decides about the same weights; remove one"
            )

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans to palettize every weight that is larger than its codebook."""
        plan, entries = context.plan_weights(model, self), 2**self.config.bits
        small = [name for name in plan.targets if raw_parameter(model, name).numel() <= entries]
        skipped = {**plan.skipped, **dict.fromkeys(small, f"has no more elements than the codebook, {entries}")}
        return Plan(tuple(name for name in plan.targets if name not in small), skipped)

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan, context: Context) -> None:
        """Clusters the weights as earlier stages have left them."""
        self._targets = plan.targets
        for name in plan.targets:
            palette = Palette(context.weight(model, name, before=self.stage), 2**self.config.bits)
            add_weight_transform(model, name, palette, stage=self.stage, key=self.name)

    @hookimpl
    def compress_epoch_step(self, model: nn.Module, clock: Clock, context: Context) -> None:
        """Lets weights choose anew."""
        for name in self._targets if clock.epoch < self.config.reassign_epochs else ():
            self._palette(model, name).assign(context.weight(model, name, before=self.stage))

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> TableStatistics:
        """Counts what indices and codebooks need."""
        rows = []
        for name in self._targets:
            palette = self._palette(model, name)
            needed = self._bits(palette) / palette.indices.numel()
            rows.append((name, palette.indices.numel(), len(palette.codebook), needed))
        table = Table("palettized layers", ("weight", "elements", "entries", "bits per element"), rows)
        return TableStatistics({"bits": self.config.bits}, [table], title="Palettization")

    @property
    def compression_rate(self) -> float:
        """Share of the bits of the weights that indices and codebooks do without."""
        palettes = [self._palette(self.model, name) for name in self._targets]
        full = sum(palette.indices.numel() * palette.codebook.element_size() * 8 for palette in palettes)
        return 1 - sum(self._bits(palette) for palette in palettes) / full

    def _bits(self, palette: Palette) -> int:
        codebook = palette.codebook
        return palette.indices.numel() * self.config.bits + codebook.numel() * codebook.element_size() * 8

    def _palette(self, model: nn.Module, name: str) -> Palette:
        palette = get_weight_transform(model, name, self.name)
        assert isinstance(palette, Palette)
        return palette


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns palettization."""
    return [Palettize]
