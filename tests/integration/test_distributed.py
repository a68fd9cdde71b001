"""Two processes: a compressed model in DistributedDataParallel trains like the same model in one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress_core import ModelError, Stage, create_compressed_model
from compress_core.transforms import ModuleOutput, add_activation_transform
from tests.integration.processes import as_rank, leave, run_in_processes
from tests.zoo import images

pytestmark = pytest.mark.slow
CONFIG = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.6, "params": {"sparsity_target": 0.6}}}


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    return create_compressed_model(model, CONFIG)


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def worker(rank, folder):
    with as_rank(rank, folder):
        controller, model = build()
        parallel = DistributedDataParallel(model)
        with pytest.raises(ModelError, match="wrapped in DistributedDataParallel"):
            create_compressed_model(parallel, CONFIG)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        controller.scheduler.epoch_step()
        train(parallel, optimizer, [images(8)[rank * 4 : rank * 4 + 4]] * 3)
        torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
        del parallel, optimizer  # the reducer must be gone before the group that it works with


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.factor


def worker_with_an_activation_transform(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=1)
    model = nn.Sequential(nn.Linear(3, 3))
    handle = add_activation_transform(model, ModuleOutput("0"), Scale(), stage=Stage.PRECISION, key="q")
    DistributedDataParallel(model)(torch.ones(2, 3)).sum().backward()
    torch.save((handle.transform.factor.grad, model[0](torch.ones(2, 3)).sum() / 2), f"{folder}/gradient.pt")
    leave()


def test_parameters_of_activation_transforms_take_part(tmp_path):
    run_in_processes(worker_with_an_activation_transform, (str(tmp_path),), 1)
    gradient, expected = torch.load(tmp_path / "gradient.pt", weights_only=True)
    torch.testing.assert_close(gradient, expected)


def test_two_processes_end_like_one(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    controller, model = build()
    start = copy.deepcopy(model.state_dict())
    controller.scheduler.epoch_step()
    train(model, torch.optim.SGD(model.parameters(), 0.1), [images(8)] * 3)
    for name, expected in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(start["0.weight"], first["0.weight"])
