"""Saves and restores the states of random number generators."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


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
        self._numpy = np.random.get_state(legacy=False)
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

    def to_dict(self) -> dict[str, Any]:
        """Returns the states in numbers, strings and tensors, so that they can be loaded without pickle."""
        version, words, gauss = self._python
        return {
            "torch": self._cpu,
            "cuda": self._cuda,
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "numpy": _without_arrays(self._numpy),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RngState:
        """Returns the states that `to_dict` returned; those of CUDA devices that are not here are left out.

        Raises:
            ValueError, TypeError, KeyError: `to_dict` did not return this.
        """
        python, cuda = state["python"], state["cuda"]
        found = cls()
        found._cpu = state["torch"].cpu()
        found._python = python["version"], tuple(python["words"].tolist()), python["gauss"]
        found._numpy = _with_arrays(state["numpy"])
        here = torch.cuda.device_count() if cuda else 0
        if cuda is not None and len(cuda) != here:
            logger.warning(
                "%d random generators of CUDA devices were saved, and %d devices are here: random numbers on CUDA will "
                "be others than in an uninterrupted run",
                len(cuda),
                here,
            )
        found._cuda = [generator.cpu() for generator in cuda[:here]] if cuda and here else None
        found._own = []
        return found


def _without_arrays(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "bytes": torch.from_numpy(value.view(np.uint8).copy())}
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "bytes"}:
        return value["bytes"].cpu().numpy().view(np.dtype(value["dtype"]))
    return {key: _with_arrays(item) for key, item in value.items()}


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
