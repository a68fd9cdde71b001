"""What the transforms of a weight leave open, from what they declare themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compress_core.transforms import ProjectingTransform, TransformedWeight, WeightGrid


@dataclass(frozen=True)
class Allowed:
    """The weights that the transforms of a parameter allow.

    Attributes:
        support: Which elements may differ from zero; boolean, of the parameter's shape.
        grid: The values that elements may have; None if any.
        gridded: The transform with the grid; None if there is none.
        project: Maps values in the parameter's shape to the nearest allowed ones.
    """

    support: torch.Tensor
    grid: WeightGrid | None
    gridded: ProjectingTransform | None
    project: Callable[[torch.Tensor], torch.Tensor]

    def fixed(self) -> Allowed:
        """Returns the same without leave to adjust the grid."""
        return self if self.grid is None else replace(self, grid=replace(self.grid, adjustable=False))

    def of_rows(self, rows: slice, parameter: torch.Tensor) -> Allowed:
        """Returns what is allowed in some rows of the parameter; the grid of a part is not adjusted."""
        grid, whole = self.grid, parameter.detach()
        if grid is not None:
            scale, zero = (v.detach().expand(whole.shape)[rows] for v in (grid.scale, grid.zero_point))
            grid = WeightGrid(scale, zero, grid.low, grid.high)

        def project(values: torch.Tensor) -> torch.Tensor:
            padded = whole.clone()
            padded[rows] = values
            return self.project(padded)[rows]

        return Allowed(self.support[rows], grid, self.gridded, project)


def allowed(weight: TransformedWeight) -> Allowed | str:
    """Returns what the transforms of a weight allow, or why that is not known."""
    support = torch.ones_like(weight.parameter, dtype=torch.bool)
    grid, gridded = None, None
    value = weight.parameter.detach()
    for key, transform in weight.chain.named_children():
        if not isinstance(transform, ProjectingTransform):
            return f"its transform '{key}' ({type(transform).__name__}) does not say which weights it allows"
        mask = transform.support(value)
        if mask is not None:
            support = support & mask.to(torch.bool)
        levels = transform.allowed_values(value)
        if levels is not None and gridded is not None:
            return f"its transform '{key}' is a second grid"
        if levels is not None:
            grid, gridded = levels, transform
        value = transform.project(value)
    return Allowed(support, grid, gridded, _projection(weight))


def _projection(weight: TransformedWeight) -> Callable[[torch.Tensor], torch.Tensor]:
    def project(values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = weight.chain(values)
            return result

    return project
