"""What the transforms of a weight leave open, from what they declare themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress_core.transforms import ProjectingTransform, TransformedWeight, WeightGrid


@dataclass(frozen=True)
class Allowed:
    """The weights that the transforms of a parameter allow.

    Attributes:
        support: Which elements may differ from zero; boolean, of the parameter's shape.
        grid: The values that elements may have; None if any.
        project: Maps values in the parameter's shape to the nearest allowed ones.
    """

    support: torch.Tensor
    grid: WeightGrid | None
    project: Callable[[torch.Tensor], torch.Tensor]


def allowed(weight: TransformedWeight) -> Allowed | str:
    """Returns what the transforms of a weight allow, or why that is not known."""
    support = torch.ones_like(weight.parameter, dtype=torch.bool)
    grid = None
    value = weight.parameter.detach()
    for key, transform in weight.chain.named_children():
        if not isinstance(transform, ProjectingTransform):
            return f"its transform '{key}' ({type(transform).__name__}) does not say which weights it allows"
        mask = transform.support(value)
        if mask is not None:
            support = support & mask.to(torch.bool)
        levels = transform.allowed_values(value)
        if levels is not None and grid is not None:
            return f"its transform '{key}' is a second grid"
        grid = levels if levels is not None else grid
        value = transform.project(value)

    def project(values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = weight.chain(values)
            return result

    return Allowed(support, grid, project)
