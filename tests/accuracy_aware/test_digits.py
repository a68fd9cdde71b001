"""Real training runs: the highest level whose accuracy holds on digits, found by the loop and by trying."""

import copy

import pytest
import torch

from compress_core import create_accuracy_aware_training_loop, create_compressed_model
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy, augmented, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    data, model = digits(), demo_network("digits")
    train(model, data.loader(train=True, batch_size=128, shuffle=True), epochs=12, max_lr=0.2)
    return data, model


def fine_tuned(trained, config, folder):
    data, fp32 = trained
    torch.manual_seed(1)
    controller, model = create_compressed_model(copy.deepcopy(fp32), config)
    loader = data.loader(train=True, batch_size=64, shuffle=True, seed=1)

    def train_epoch(controller, model, epoch, optimizer, lr_scheduler):
        model.train()
        for images, labels in loader:
            controller.scheduler.step()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(augmented(images, flip=False)), labels) + controller.loss()
            loss.backward()
            optimizer.step()

    def optimizers():
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True), None

    loop = create_accuracy_aware_training_loop(config, controller, accuracy(fp32, data.test), verbose=False)
    loop.run(model, train_epoch, lambda model, epoch: accuracy(model, data.test), optimizers, log_dir=folder)
    return loop, controller, model


def test_it_ends_at_the_highest_level_whose_accuracy_holds(tmp_path, trained):
    data, fp32 = trained
    config = {
        "accuracy_aware_training": {
            "mode": "adaptive_compression_level",
            "params": {
                "maximal_absolute_accuracy_degradation": 1.0,
                "initial_training_phase_epochs": 1,
                "patience_epochs": 2,
                "initial_compression_rate_step": 0.2,
                "minimal_compression_rate_step": 0.05,
            },
        },
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.7,
            "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 1},
        },
    }
    loop, controller, model = fine_tuned(trained, config, tmp_path)
    statistics = loop.statistics
    # What is returned is what the statistics say, measured anew.
    assert accuracy(model, data.test) == statistics.compressed_accuracy
    assert statistics.compressed_accuracy >= accuracy(fp32, data.test) - 1.0
    weights = [p for p in controller.strip().parameters() if p.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(statistics.compression_rate, abs=1e-3) and zeros > 0.75
    # No level above it held, and the next one above it was tried: within a step of what is possible.
    searched = [r for r in statistics.epochs if r.phase == "search"]
    assert statistics.compression_rate == max(r.rate for r in searched if r.budget >= 0)
    above = [r.rate for r in searched if r.rate > statistics.compression_rate + 1e-3]
    assert statistics.compression_rate > 0.94 or (above and min(above) < statistics.compression_rate + 0.11)
