"""Two processes train what one process trains from the same data, with the same noise."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.integration.processes import as_rank, run_in_processes
from tests.plugins.learned_sparsity.scores_helpers import batches, create, network

pytestmark = pytest.mark.slow
SECTIONS = {
    "rb_sparsity": {
        "sparsity_init": 0.3,
        "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3},
    },
    "movement_sparsity": {
        "params": {
            "warmup_start_epoch": 1,
            "warmup_end_epoch": 3,
            "importance_regularization_factor": 0.1,
            "enable_structured_masking": False,
        },
    },
}


def train(algorithm, wrap, part):
    controller, model = create(network(), algorithm, **SECTIONS[algorithm])
    parallel = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for _ in range(4):  # the masks are frozen in the last epoch, while the wrapper stays
        controller.scheduler.epoch_step()
        for x in batches(3):
            controller.scheduler.step()
            optimizer.zero_grad()
            (parallel(x[part])[:, 0].square().mean() + controller.loss()).backward()
            optimizer.step()
    return model.state_dict()


def worker(rank, folder):
    with as_rank(rank, folder):
        found = {name: train(name, DistributedDataParallel, slice(4 * rank, 4 * rank + 4)) for name in SECTIONS}
        torch.save(found, f"{folder}/rank{rank}.pt")


def test_two_processes_end_like_one(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for algorithm in SECTIONS:
        expected = train(algorithm, lambda model: model, slice(None))
        for name, value in expected.items():
            assert torch.equal(ranks[0][algorithm][name], ranks[1][algorithm][name]), name
            torch.testing.assert_close(ranks[0][algorithm][name], value, rtol=1e-4, atol=1e-5)
