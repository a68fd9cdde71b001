"""A mask that remembers by what magnitudes are multiplied to rank them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core import Stage
from compress_core.transforms import add_weight_transform, get_weight_transform, raw_parameter
from compress_core.transforms.mask import WeightMask


class RatedMask(WeightMask):
    """A mask with the factors that data gave at the creation, so that later levels need no data.

    Attributes:
        factor: Importances are |w| * factor; it broadcasts to the weight. None where data has shown nothing.
    """

    factor: torch.Tensor | None
    follows: ClassVar[Mapping[str, str]] = {"mask": "weight", "factor": "weight"}

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(mask)
        self.register_buffer("factor", None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        found = state_dict.get(f"{prefix}factor")
        # What is resumed has no factors yet, and their shape is known only now.
        if isinstance(found, torch.Tensor) and found.ndim == self.mask.ndim:
            sizes = zip(found.shape, self.mask.shape, strict=True)
            if all(size in (1, wanted) for size, wanted in sizes):
                self.factor = torch.empty_like(found, device=self.mask.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


def add_mask(model: nn.Module, name: str, key: str) -> None:
    """Adds a mask that keeps everything to a weight, unless a tied one has brought it already."""
    if get_weight_transform(model, name, key) is None:
        mask = torch.ones_like(raw_parameter(model, name), dtype=torch.bool, requires_grad=False)
        add_weight_transform(model, name, RatedMask(mask), stage=Stage.SPARSITY, key=key)
