"""A small least-squares solver, until there is a better one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normal:
    count: int
    input_mean: Tensor
    target_mean: Tensor
    gram: Tensor
    cross: Tensor
    target_square: Tensor


class Moments:
    def __init__(self, groups: int, columns: int, rows: int, *, device: torch.device, centred: bool = True) -> None:
        self.centred, self.count = centred, 0
        options = {"dtype": torch.float64, "device": device}
        self.inputs = torch.zeros(groups, columns, **options)
        self.targets = torch.zeros(groups, rows, **options)
        self.gram = torch.zeros(groups, columns, columns, **options)
        self.cross = torch.zeros(groups, rows, columns, **options)
        self.square = torch.zeros(groups, rows, **options)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        self.count += inputs.shape[1]
        self.inputs += inputs.sum(1)
        self.targets += targets.sum(1)
        self.gram += inputs.mT @ inputs
        self.cross += targets.mT @ inputs
        self.square += targets.square().sum(1)

    def finalize(self) -> Normal:
        mean, target = self.inputs / self.count, self.targets / self.count
        gram, cross, square = self.gram / self.count, self.cross / self.count, self.square / self.count
        if self.centred:
            gram = gram - mean.unsqueeze(2) * mean.unsqueeze(1)
            cross = cross - target.unsqueeze(2) * mean.unsqueeze(1)
            square = square - target.square()
        return Normal(self.count, mean, target, gram, cross, square)


@dataclass(frozen=True)
class Freedom:
    support: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Solution:
    weight: Tensor
    bias: Tensor
    error_before: Tensor
    error_after: Tensor


def solve(weight: Tensor, normal: Normal, freedom: Freedom, *, damping: float) -> Solution:
    gram, cross = normal.gram, normal.cross
    old = weight.double()
    mask = torch.ones_like(old, dtype=torch.bool) if freedom.support is None else freedom.support.expand_as(old)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = damping * (diagonal + 0.1 * diagonal.mean(1, keepdim=True))
    ridge = torch.where(diagonal > 0, ridge, 1.0)
    damped = gram + torch.diag_embed(ridge)
    start = old * mask
    residual = cross - start @ gram
    new = start.clone()
    for g in range(old.shape[0]):
        same = bool((mask[g] == mask[g, :1]).all())
        if same:
            kept = mask[g, 0].nonzero().flatten()
            if len(kept):
                new[g][:, kept] += torch.linalg.solve(damped[g][kept][:, kept], residual[g][:, kept].T).T
            continue
        for r in range(old.shape[1]):
            kept = mask[g, r].nonzero().flatten()
            if len(kept):
                new[g, r, kept] += torch.linalg.solve(damped[g][kept][:, kept], residual[g, r, kept])
    if freedom.project is not None:
        new, start = freedom.project(new.to(weight.dtype)).double(), freedom.project(start.to(weight.dtype)).double()

    def error(w: Tensor) -> Tensor:
        return normal.target_square - 2 * (w * cross).sum(2) + ((w @ gram) * w).sum(2)

    bias = normal.target_mean - (new @ normal.input_mean.unsqueeze(2)).squeeze(2)
    return Solution(new.to(weight.dtype), bias, error(start), error(new))
