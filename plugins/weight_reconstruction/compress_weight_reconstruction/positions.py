"""Chooses at which positions of a convolution's output the moments are taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# With fewer rows than this for each column, more positions of each sample are taken.
_ROWS_PER_COLUMN = 4
# Positions of so many times as many as are wanted are drawn with repetition, which is rarely one.
_SPARSE = 64


class Positions:
    """Random positions, from a generator of its own.

    Args:
        wanted: Number of positions of each sample.
        samples: Number of samples in all.
    """

    def __init__(self, wanted: int, samples: int) -> None:
        self._wanted, self._samples = wanted, samples
        self._generator = torch.Generator().manual_seed(0)

    def choose(self, samples: int, sizes: Sequence[int], columns: int) -> torch.Tensor:
        """Returns flat indices of positions, all if there are few; shape (samples, positions).

        Args:
            samples: Number of samples in the batch.
            sizes: Spatial sizes of the output.
            columns: Number of inputs of each output; of few samples more positions are taken.
        """
        available = math.prod(sizes)
        wanted = max(self._wanted, math.ceil(_ROWS_PER_COLUMN * columns / self._samples))
        if available <= wanted:
            return torch.arange(available).expand(samples, -1)
        if available > _SPARSE * wanted:
            return torch.randint(available, (samples, wanted), generator=self._generator)
        return torch.rand(samples, available, generator=self._generator).topk(wanted).indices
