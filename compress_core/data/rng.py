"""Saves and restores the states of random number generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


class RngState:
    """The states of all global generators: torch on the CPU and on each CUDA device in use, Python and numpy.

    Args:
        generators: Further `torch.Generator` objects, such as that of a data loader.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._cpu = torch.get_rng_state()
        # Reading CUDA's state would initialize CUDA; a process that has not used it has no state to save.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._own = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Restores the state of every generator."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for generator, state in self._own:
            generator.set_state(state)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Returns the random generators of a data loader and its samplers."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {
        id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)
    }
    return list(found.values())


@contextlib.contextmanager
def preserved_rng(*loaders: Any) -> Iterator[None]:
    """Context manager that restores all random generators on exit, also those of the given loaders."""
    state = RngState(generator for loader in loaders for generator in generators_of(loader))
    try:
        yield
    finally:
        state.restore()
