"""Chosen bits under torch.compile, and in two processes that each have a half of the data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.integration.processes import as_rank, run_in_processes
from tests.plugins.quantization.precision.search_helpers import bits_of, created, pairs

METHODS = {
    "sensitivity": {"type": "sensitivity", "budget": {"average_bits": 4}, "frontier_points": 0},
    "hawq": {"type": "hawq", "iter_number": 2},
    "autoq": {"type": "autoq", "iter_number": 1},
}


def test_a_compiled_model_trains_and_evaluates_as_it_is():
    controller, model = created(METHODS["sensitivity"])
    bits = bits_of(controller)
    assert len(set(bits.values())) > 1
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for run, owner in ((model, model), (compiled, twin)):
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.05)
        owner.train()
        for x, y in pairs(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x), y).backward()
            optimizer.step()
    x = pairs(1, seed=5)[0][0]
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), compiled.train(mode)(x))
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert bits_of(controller) == bits


def worker(rank, folder):
    with as_rank(rank, folder):
        data = pairs(1, seed=rank + 1)
        found = {name: created(METHODS[name], loader=data)[0] for name in ("sensitivity", "hawq", "autoq")}
        errors = found["sensitivity"].precision_report.sensitivities
        torch.save(({name: bits_of(one) for name, one in found.items()}, errors), f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_processes_choose_the_same_bits_from_the_data_of_all(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    bits, errors = first
    whole = pairs(1, seed=1) + pairs(1, seed=2)
    for name, chosen in bits.items():
        assert bits_of(created(METHODS[name], loader=whole)[0]) == chosen, name
    expected = created(METHODS["sensitivity"], loader=whole)[0].precision_report.sensitivities
    half = created(METHODS["sensitivity"], loader=whole[:1])[0].precision_report.sensitivities
    assert errors != half
    for name, values in expected.items():
        assert errors[name] == pytest.approx(values, rel=1e-3), name
