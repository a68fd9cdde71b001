"""Two processes with their own data find one ranking: that of the mean over both."""

import pytest
import torch

from compress_core import create_compressed_model, register_default_init_args
from tests.integration.processes import as_rank, run_in_processes
from tests.plugins.filter_pruning.pruning_helpers import Chain, config, inputs, seen

pytestmark = pytest.mark.slow
PARAMS = {
    "learned_ranking": {"legr_params": {"generations": 6, "population_size": 3, "train_steps": 2, "num_samples": 2}},
    "adapted_ranking": {"adapted_params": {"candidates": 6, "population_size": 3, "calibration_samples": 16}},
}


def train(loader, model, optimizer, controller, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(loader[0]).square().mean().backward()
        optimizer.step()


def validate(model, loader):
    return 0.0, model(loader[0]).square().mean()


def found(kind, data, **params):
    torch.manual_seed(0)
    document = config(0.4, interlayer_ranking_type=kind, **PARAMS[kind], **params)
    functions = {"train_steps_fn": train, "val_loader": data, "validate_fn": validate}
    document = register_default_init_args(document, data, **(functions if kind == "learned_ranking" else {}))
    controller, _ = create_compressed_model(seen(Chain()), document)
    ranking = controller.statistics().filter_pruning.ranking
    return {"coefficients": ranking.coefficients, "value": ranking.value}


def worker(rank, folder):
    with as_rank(rank, folder):
        path = f"{folder}/ranking.json"
        results = {kind: found(kind, [inputs(8, rank)], save_ranking_coeffs_path=path) for kind in PARAMS}
        torch.save({kind: (r["coefficients"], r["value"]) for kind, r in results.items()}, f"{folder}/rank{rank}.pt")


def test_both_find_the_same(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    alone = found("adapted_ranking", [inputs(8, 0), inputs(8, 1)])
    coefficients, value = first["adapted_ranking"]
    assert value == pytest.approx(alone["value"], rel=1e-4)
    assert coefficients == alone["coefficients"]
    assert (tmp_path / "ranking.json").exists()
