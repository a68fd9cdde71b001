"""The documented bounds on memory, by the sizes of all tensors that live at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_weight_reconstruction.solvers import Freedom, Grid, Moments, rounding, solve, system
from tests.plugins.weight_reconstruction.solvers.solver_helpers import layer, normal_of

FLOAT64 = 8


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, from their first sight to their end."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), known)
        return result

    def _add(self, storage, known):
        key, size = id(storage), storage.nbytes()
        if key in known or key in self._seen:
            return

        def gone(_):
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def test_live_bytes_are_those_of_tensors_that_live():
    with LiveBytes() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100)[1:].add(1)
        a.add_(1)
        del b
        c = a * 2
    assert (memory.live, memory.peak) == (8000, 8000)
    assert c.sum() == 4000


ROWS, COLUMNS = 16, 320
GRAM = COLUMNS * COLUMNS * 4
# The Gram matrix is read in pieces of some columns in float64, of which up to three live at a time.
PIECE = 64
PIECES = 3 * PIECE * COLUMNS * FLOAT64


def freedoms(weight):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(weight.shape, generator=generator) < 0.3
    grid = Grid(weight.abs().amax(2, keepdim=True) / 3, -4, 3, adjustable=True)
    return {
        "nothing": Freedom(),
        "mask": Freedom(support=mask),
        "dense mask": Freedom(support=~mask),
        "columns": Freedom(support=mask[:, :1].expand_as(mask)),
        "grid": Freedom(grid=grid),
        "mask and grid": Freedom(support=mask, grid=grid),
    }


@pytest.fixture(scope="module")
def wide_layer():
    inputs, weight, targets = layer(1, ROWS, COLUMNS, 500, dtype=torch.float32)
    return weight, normal_of(inputs, targets)


@pytest.mark.parametrize("kind", freedoms(torch.ones(1, 2, 2)))
def test_solving_stays_within_its_workspace(wide_layer, kind, monkeypatch):
    monkeypatch.setattr(system, "_COLUMNS", PIECE)
    monkeypatch.setattr(rounding, "_BLOCK", PIECE)
    weight, normal = wide_layer
    freedom = freedoms(weight)[kind]
    results = 3 * weight.numel() * 4
    # The factor does not fit; it does.
    for workspace in (GRAM, 2 * GRAM):
        with LiveBytes() as memory:
            solution = solve(weight, normal, freedom, damping=0.1, sweeps=1, workspace=workspace)
        assert memory.peak <= workspace + results + PIECES
        assert (solution.error_after <= solution.error_before).all()


@pytest.mark.parametrize("columns", [640, 1100])
def test_moments_keep_what_they_document(columns):
    inputs, _, targets = layer(1, 8, columns, 50, dtype=torch.float32)
    item = 8 if columns <= 1024 else 4
    sums = columns * columns * item + columns * 8 * FLOAT64
    with LiveBytes() as memory:
        moments = Moments(1, columns, 8, device="cpu")
        for _ in range(3):
            moments.update(inputs, targets)
    small = 6 * inputs.numel() * 4 + 64 * columns * FLOAT64
    # Products of 512 columns are added to float64 sums.
    products = 512 * columns * 4 if item == 8 else 0
    assert memory.live <= sums + 10 * (columns + 8) * FLOAT64
    assert memory.peak <= sums + products + small
    with LiveBytes() as memory:
        normal = moments.finalize()
    assert normal.gram.dtype == torch.float32
    assert memory.peak <= sums + sums / 2 + 512 * 512 * 4 * 3 + small
