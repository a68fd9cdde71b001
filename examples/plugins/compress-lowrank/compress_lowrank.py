"""Low-rank factorization for compress-core: a layer becomes two thinner ones."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    Context,
    Plan,
    Stage,
    StateError,
    Table,
    TableStatistics,
    hookimpl,
)


def energy_rank(weight: torch.Tensor, energy: float) -> int:
    """Returns the smallest rank whose singular values hold a share of the sum of all squares."""
    squares = torch.linalg.svdvals(weight.detach().flatten(1).double()).square()
    share = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    # A sum may end at 1 - 1e-16.
    return min(int((share < energy - 1e-12).sum()) + 1, len(squares))


def factorized(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """Returns two layers that compute the best approximation of a rank (Eckart and Young, 1936).

    The bias is the layer's own parameter, in the second.
    """
    u, s, vh = torch.linalg.svd(layer.weight.detach().flatten(1).double(), full_matrices=False)
    root = s[:rank].sqrt()
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False, **made)
        second = nn.Linear(rank, layer.out_features, bias=False, **made)
    else:
        where: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "padding_mode": layer.padding_mode}
        first = nn.Conv2d(layer.in_channels, rank, 1, bias=False, **where, **made)
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=False, **made)
    for module, factor in ((first, root[:, None] * vh[:rank]), (second, u[:, :rank] * root)):
        trained = layer.weight.requires_grad
        module.weight = nn.Parameter(factor.to(layer.weight.dtype).view_as(module.weight), trained)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)


class LowRankConfig(AlgorithmConfig):
    """Section of the algorithm `lowrank`."""

    algorithm: Literal["lowrank"] = Field(description="name of the algorithm")
    energy: float = Field(0.9, gt=0, le=1, description="share of its squared singular values that a layer keeps")
    rank: int | None = Field(None, ge=1, description="the same rank for all layers, instead of energy")


class LowRank(Algorithm):
    """Linear layers and 1x1 convolutions by truncated singular value decomposition."""

    name = "lowrank"
    Config = LowRankConfig
    stage = Stage.STRUCTURE
    replaces_modules = True

    config: LowRankConfig
    _ranks: dict[str, int]
    _sizes: dict[str, tuple[int, int]]

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Reads the section: `energy` does nothing where there is a rank."""
        self._rank = self.config.rank
        self._energy = self.config.energy if self._rank is None else 0.0
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Chooses ranks; whoever resumes takes those that were chosen, and looks at no weight."""
        tensors, skipped = context.weight_targets(model, self)
        reasons = {tensor.name: _reason_to_skip(model, tensor.name, tensor.module_names) for tensor in tensors}
        saved = context.saved_plans[self.name].details["ranks"] if context.resuming else {}
        ranks = {}
        for name in (name for name, reason in reasons.items() if not reason):
            weight = model.get_parameter(name)
            outputs, inputs = weight.shape[:2]
            if context.resuming and name not in saved:
                reasons[name] = "had too large a rank to gain by it"
                continue
            rank = saved.get(name) or self._rank or energy_rank(weight, self._energy)
            if rank * (outputs + inputs) < outputs * inputs:
                ranks[name] = rank
            elif context.resuming:
                raise StateError(f"compression_state does not fit this model: '{name}' is too small for rank {rank}")
            else:
                reasons[name] = "had too large a rank to gain by it"
        skipped |= {name: reason for name, reason in reasons.items() if reason}
        return Plan(tuple(ranks), skipped, {"ranks": ranks})

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan) -> None:
        """Puts two layers in the place of each; layers that several modules hold stay shared."""
        self._ranks, self._sizes = dict(plan.details["ranks"]), {}
        for name, rank in self._ranks.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            self._sizes[name] = (layer.weight.shape[0], layer.weight.shape[1])
            pair = factorized(layer, rank)
            places = [path for path, module in model.named_modules(remove_duplicate=False) if module is layer]
            for parent, _, own in (path.rpartition(".") for path in places):
                setattr(model.get_submodule(parent), own, pair)

    @hookimpl
    def compress_statistics(self) -> TableStatistics:
        """Lists ranks and what is gone."""
        rows = [(name, *self._sizes[name], rank, *self._weights(name)) for name, rank in self._ranks.items()]
        table = Table("factorized layers", ("weight", "outputs", "inputs", "rank", "weights before", "weights"), rows)
        return TableStatistics({"layers": len(rows), "gone": self.compression_rate}, [table], title="Low rank")

    @property
    def compression_rate(self) -> float:
        """Share of the weights of factorized layers that is gone."""
        counts = [self._weights(name) for name in self._ranks]
        return 1 - sum(after for _, after in counts) / sum(before for before, _ in counts)

    def _weights(self, name: str) -> tuple[int, int]:
        outputs, inputs = self._sizes[name]
        return outputs * inputs, self._ranks[name] * (outputs + inputs)


def _reason_to_skip(model: nn.Module, name: str, owners: tuple[str, ...]) -> str:
    path = name.rpartition(".")[0]
    layer = model.get_submodule(path)
    if not path:
        return "is the model itself"
    if len(owners) > 1:
        return f"is shared by {', '.join(owners)}"
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    # A subclass may be asked for its weight by others, as that of nn.MultiheadAttention is.
    if type(layer) is not nn.Linear and not (type(layer) is nn.Conv2d and pointwise):
        return "is no weight of an nn.Linear or a 1x1 nn.Conv2d"
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "is read by nn.TransformerEncoderLayer itself"
    return ""


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns low-rank factorization."""
    return [LowRank]
