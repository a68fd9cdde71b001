"""A small training whose metric is made up, or measured."""

import copy
from typing import Any

import torch
from torch import nn

from compress_core import create_accuracy_aware_training_loop, create_compressed_model

SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.3,
    "params": {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.3, 0.5]},
}
PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.25,
    "params": {"schedule": "baseline", "pruning_target": 0.25, "multiple_of": 1, "prune_first_conv": True},
}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.drop(self.conv2(x).relu().mean((2, 3))))


def document(mode: str, sections: Any, **params: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "input_info": {"sample_size": [1, 3, 8, 8]},
            "accuracy_aware_training": {"mode": mode, "params": params},
            "compression": sections,
        }
    )


def adaptive(sections: Any = SPARSITY, **params: Any) -> dict[str, Any]:
    defaults = {"initial_training_phase_epochs": 2, "patience_epochs": 2, "maximal_absolute_accuracy_degradation": 1.0}
    return document("adaptive_compression_level", sections, **{**defaults, **params})


class Training:
    """Everything that `run` is given.

    Args:
        config: The document.
        metric: `(training)` -> the metric; by default that of `metrics` in turn, and 0 after its end.
        metrics: Metrics in turn; the first is that before training.
        state: A compression state to resume.
    """

    def __init__(self, config, metric=None, metrics=(), state=None, optimizer=torch.optim.Adam, scheduler=None):
        torch.manual_seed(1)
        self.config, self._metric, self._metrics = config, metric, list(metrics)
        loader = [(IMAGES, LABELS)]
        self.controller, self.model = create_compressed_model(Net(), config, state, init_loader=loader)
        self._optimizer, self._scheduler = optimizer, scheduler
        self.calls = []
        self.rates = []
        self.stop_after = None

    def loop(self, accuracy=0.0, **arguments):
        arguments = {"verbose": False, **arguments}
        return create_accuracy_aware_training_loop(self.config, self.controller, accuracy, **arguments)

    def run(self, loop, log_dir, **more):
        arguments = {
            "train_epoch_fn": self.train_epoch,
            "validate_fn": self.validate,
            "configure_optimizers_fn": self.optimizers,
            "log_dir": log_dir,
            **more,
        }
        return loop.run(self.model, **arguments)

    def train_epoch(self, controller, model, epoch, optimizer, lr_scheduler):
        self.calls.append(("train", epoch, optimizer.param_groups[0]["lr"]))
        if self.stop_after is not None and len([c for c in self.calls if c[0] == "train"]) > self.stop_after:
            raise InterruptedError
        model.train()
        for part in torch.randperm(8).split(4):
            controller.scheduler.step()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(IMAGES[part]), LABELS[part]) + controller.loss()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def validate(self, model, epoch):
        assert not torch.is_grad_enabled()
        model.eval()
        self.rates.append(self.controller.compression_rate)
        if self._metric is not None:
            return self._metric(self)
        return self._metrics.pop(0) if self._metrics else 0.0

    def optimizers(self):
        optimizer = self._optimizer(self.model.parameters(), lr=0.01)
        return optimizer, None if self._scheduler is None else self._scheduler(optimizer)

    def everything(self):
        return self.model.state_dict(), self.controller.get_compression_state()


def holds_up_to(level, slope=10.0):
    """A metric that falls linearly with the rate, and is -1 (lowest allowed) at a level."""
    return lambda training: -1.0 + slope * (level + 1e-9 - training.controller.compression_rate)


def assert_same(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}.{number}")
    else:
        assert one == other, path
