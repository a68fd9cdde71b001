"""Random number generators: saved, and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


class RngState:
    """The state of every global generator: torch on the CPU and on each CUDA device in use, Python's, numpy's.

    Args:
        generators: Further `torch.Generator` objects, such as a data loader's own.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._cpu = torch.get_rng_state()
        # Asking for CUDA's state initializes CUDA; a process that has not touched it has no state to keep.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._own = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Puts every generator back to where it stood."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for generator, state in self._own:
            generator.set_state(state)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Returns the generators that a data loader and its samplers draw from."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {
        id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)
    }
    return list(found.values())


@contextlib.contextmanager
def preserved_rng(*loaders: Any) -> Iterator[None]:
    """Within the context random numbers may be drawn; afterwards every generator is where it was."""
    state = RngState(generator for loader in loaders for generator in generators_of(loader))
    try:
        yield
    finally:
        state.restore()
