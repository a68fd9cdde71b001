"""N:M sparsity for compress-core: of every M weights along the input channels, the N largest stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Algorithm,
    AlgorithmConfig,
    ChoiceOf,
    Clock,
    CompressionStage,
    ConfigError,
    Context,
    Plan,
    Stage,
    Table,
    TableStatistics,
    choice,
    hookimpl,
    mask_weight,
)
from compress_core.channels import Shrinkage
from compress_core.transforms import WeightMask, get_weight_transform, raw_parameter

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def nm_mask(weight: torch.Tensor, n: int, m: int, share: float = 1.0) -> torch.Tensor:
    """Returns which weights stay: of each block of `m` along dimension 1, the `n` of largest magnitude.

    Args:
        weight: A weight, output channels first, then input channels.
        n: Weights that stay of each block.
        m: Size of a block; inputs behind the last whole block stay as they are.
        share: Share of the blocks that are masked, those first that lose least magnitude.

    Returns:
        Booleans in the weight's shape.
    """
    rows = weight.detach().abs().movedim(1, -1)
    covered = rows.shape[-1] // m * m
    blocks = rows[..., :covered].reshape(*rows.shape[:-1], covered // m, m)
    keep = torch.ones_like(blocks, dtype=torch.bool)
    keep.scatter_(-1, blocks.topk(m - n, dim=-1, largest=False).indices, False)
    loss = blocks.masked_fill(keep, 0).sum(-1)
    untouched = torch.zeros(loss.numel(), dtype=torch.bool, device=weight.device)
    untouched[loss.flatten().argsort(stable=True)[round(share * loss.numel()) :]] = True
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[..., :covered] = (keep | untouched.view(*loss.shape, 1)).flatten(-2)
    return mask.movedim(-1, 1)


class NmSparsityConfig(AlgorithmConfig):
    """Section of the algorithm `nm_sparsity`."""

    algorithm: Literal["nm_sparsity"] = Field(description="name of the algorithm")
    n: int = Field(2, ge=1, description="weights that stay of each block")
    m: int = Field(4, ge=2, description="size of a block: weights of neighbouring input channels")
    start_epoch: int = Field(0, ge=0, description="epoch from which blocks are masked")
    duration: int = Field(0, ge=0, description="epochs from the first masked block to the last; 0: all at once")
    schedule: Annotated[str, ChoiceOf("level_schedule")] = Field(
        "exponential", description="how sparsity grows in that time, from 0 to 1 - n / m"
    )


class NmSparsity(Algorithm):
    """N:M sparsity by magnitude (Mishra et al. 2021, arXiv:2104.08378), at once or block by block.

    Masks are computed when the share of masked blocks changes; when all are, they stay as they are.
    """

    name = "nm_sparsity"
    Config = NmSparsityConfig
    stage = Stage.SPARSITY

    config: NmSparsityConfig
    _curve: Callable[[float], float] | None = None
    _targets: tuple[str, ...] = ()
    _share = 0.0

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Makes the schedule."""
        config = self.config
        if config.n >= config.m:
            raise ConfigError(f"{config.n} of {config.m} weights would stay, which is all; lower n", path="n")
        self._start = config.start_epoch
        if config.duration:
            self._curve = choice(config.schedule, "level_schedule")(0.0, 1 - config.n / config.m, config.duration)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module, context: Context) -> Plan:
        """Plans to mask what has at least one block."""
        plan = context.plan_weights(model, self)
        reasons = {name: self._reason_to_skip(model, name) for name in plan.targets}
        skipped = {**plan.skipped, **{name: reason for name, reason in reasons.items() if reason}}
        return Plan(tuple(name for name in plan.targets if not reasons[name]), skipped)

    @hookimpl
    def compress_commit(self, model: nn.Module, plan: Plan) -> None:
        """Adds the masks, as the first epoch is going to have them."""
        self._targets = plan.targets
        self._mask(model, self._share_at(0))

    @hookimpl
    def compress_epoch_step(self, model: nn.Module, clock: Clock) -> None:
        """Masks further blocks."""
        share = self._share_at(clock.epoch)
        if share != self._share:
            self._mask(model, share)

    @hookimpl
    def compress_shrunk(self, model: nn.Module, shrinkage: Shrinkage) -> None:
        """Where input channels are gone, blocks begin elsewhere: they get their pattern anew."""
        names = [name for name in self._targets if 1 in shrinkage.kept.get(name, {})]
        self._mask(model, self._share, names)

    @hookimpl
    def compress_stage(self) -> CompressionStage:
        """Tells how many blocks are masked."""
        if self._share == 1:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if self._share else CompressionStage.UNCOMPRESSED

    @hookimpl
    def compress_statistics(self, model: nn.Module) -> TableStatistics:
        """Counts zeros, and what no block covers."""
        rows = []
        for name in self._targets:
            kept, inputs = self._mask_of(model, name), raw_parameter(model, name).shape[1]
            rows.append((name, inputs, inputs % self.config.m, kept.numel(), int((kept == 0).sum())))
        table = Table("N:M layers", ("weight", "inputs", "inputs left dense", "weights", "zeros"), rows)
        pattern = f"{self.config.n}:{self.config.m}"
        return TableStatistics({"pattern": pattern, "masked_blocks": self._share}, [table], title="N:M sparsity")

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the share of masked blocks; the masks are in the model's `state_dict`."""
        return {"share": self._share}

    @hookimpl
    def compress_load_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Masks as many blocks again; a `state_dict` brings the saved masks."""
        self._mask(model, float(state["share"]))

    @property
    def compression_rate(self) -> float:
        """Share of the weights that is masked; measured."""
        kept = [self._mask_of(self.model, name) for name in self._targets]
        return sum(int((mask == 0).sum()) for mask in kept) / sum(mask.numel() for mask in kept)

    def _reason_to_skip(self, model: nn.Module, name: str) -> str:
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), _LAYERS):
            return "is no weight of a linear layer or a convolution"
        inputs = raw_parameter(model, name).shape[1]
        return "" if inputs >= self.config.m else f"has {inputs} input channels, a block is {self.config.m}"

    def _share_at(self, epoch: int) -> float:
        if epoch < self._start:
            return 0.0
        if self._curve is None:
            return 1.0
        return min(max(self._curve(epoch - self._start) / (1 - self.config.n / self.config.m), 0.0), 1.0)

    def _mask(self, model: nn.Module, share: float, names: list[str] | None = None) -> None:
        for name in self._targets if names is None else names:
            weight = self.context.weight(model, name, before=self.stage)
            mask_weight(model, name, nm_mask(weight, self.config.n, self.config.m, share), key=self.name)
        self._share = share

    def _mask_of(self, model: nn.Module, name: str) -> torch.Tensor:
        transform = get_weight_transform(model, name, self.name)
        assert isinstance(transform, WeightMask)
        return transform.mask


@hookimpl
def compress_algorithms() -> list[type[Algorithm]]:
    """Returns N:M sparsity."""
    return [NmSparsity]
