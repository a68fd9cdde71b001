"""A small training with everything that a checkpoint holds: dropout, shuffled data, schedules, an average."""

import copy
import functools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from compress_core import StateError, create_compressed_model, load_checkpoint, read_checkpoint, save_checkpoint
from compress_core.session.checkpoint_file import write_summed

EPOCHS = 4
_MADE = torch.Generator().manual_seed(7)
DATA = TensorDataset(torch.randn(24, 3, 8, 8, generator=_MADE), torch.randint(0, 4, (24,), generator=_MADE))
EXAMPLE = [(DATA.tensors[0][:12], 0)]

PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.25,
    "params": {"pruning_target": 0.5, "pruning_steps": 3, "prune_first_conv": True, "multiple_of": 1},
}
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.2,
    "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 3},
}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 12}}}
SETS = {
    "quantization": [QUANTIZATION],
    "magnitude_sparsity": [SPARSITY],
    "filter_pruning": [PRUNING],
    "all": [PRUNING, SPARSITY, QUANTIZATION],
}


class Net(nn.Module):
    """Convolutions, batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.dropout(x.mean((2, 3))))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


class Training:
    """A model with its controller, optimizer, scheduler, scaler and average.

    Args:
        algorithms: Sections of the config.
        make_optimizer: Makes the optimizer.
        state: A compression state to resume.
    """

    def __init__(self, algorithms, make_optimizer=sgd, state=None):
        config = {"compression": [dict(section) for section in algorithms]}
        data = EXAMPLE if state is None else None
        if data is None:
            config["input_info"] = {"sample_size": [12, 3, 8, 8]}
        self.controller, self.model = create_compressed_model(Net(), config, state, init_loader=data)
        self.optimizer = make_optimizer(self.model.parameters())
        steps = EPOCHS * len(DATA) // 6
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=steps)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        self.losses = []

    @property
    def parts(self):
        """What is saved besides the controller."""
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler, "ema": self.ema}

    def run(self, epochs):
        """Trains; draws from the generators of torch, Python and NumPy."""
        for _ in range(epochs):
            self.controller.scheduler.epoch_step()
            for images, labels in DataLoader(DATA, batch_size=6, shuffle=True):
                self.controller.scheduler.step()
                self.optimizer.zero_grad()
                noise = random.gauss(0, 0.1) + float(np.random.standard_normal()) / 10
                outputs = self.model.train()(images + noise)
                loss = nn.functional.cross_entropy(outputs, labels) + self.controller.loss()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scheduler.step()
                self.ema.update_parameters(self.model)
                self.losses.append(loss.item())

    def everything(self):
        """All that a checkpoint holds, for comparing."""
        states = [part.state_dict() for part in self.parts.values()]
        numpy_state = np.random.get_state()
        generators = torch.get_rng_state(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]
        compression = self.controller.get_compression_state()
        return [self.model.state_dict(), compression["scheduler"], compression["algorithms"], *states, *generators]


def seed(number):
    """Seeds all generators."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def assert_same(left, right, place=""):
    """Asserts equal values, bit for bit."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}.{number}")
    else:
        assert left == right, place


def resumed(path, algorithms, make_optimizer=sgd):
    """A training as a new process would resume it: other weights, other random numbers."""
    seed(99)
    checkpoint = read_checkpoint(path)
    training = Training(algorithms, make_optimizer, checkpoint.compression_state)
    checkpoint.restore(training.controller, **training.parts)
    return training


@functools.cache
def one_epoch():
    """The bytes of a checkpoint after one epoch of all algorithms."""
    seed(1)
    training = Training(SETS["all"])
    training.run(1)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "saved.pt", training.controller, **training.parts, epoch=1)
        return (Path(folder) / "saved.pt").read_bytes()


def ready(path, make_optimizer=sgd, steps=1):
    """A training that was resumed from the state, and then trained by steps of its optimizer without the controller."""
    seed(5)
    training = Training(SETS["all"], make_optimizer, read_checkpoint(path).compression_state)
    for _ in range(steps):
        training.scaler.scale(training.model.train()(EXAMPLE[0][0]).square().mean()).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.scheduler.step()
        training.ema.update_parameters(training.model)
    return training


def refused(path, training, match, error=StateError, **changes):
    """Asserts that a checkpoint is refused, and that nothing has changed; returns the message."""
    before, gradients = copy.deepcopy(training.everything()), [p.grad for p in training.model.parameters()]
    containers = [training.optimizer.param_groups[0], training.optimizer.state]
    parts = {**training.parts, **changes}
    with pytest.raises(error, match=match) as caught:
        load_checkpoint(path, training.controller, **parts)
    assert_same(training.everything(), before)
    assert all(p.grad is g for p, g in zip(training.model.parameters(), gradients, strict=True))
    assert training.optimizer.param_groups[0] is containers[0] and training.optimizer.state is containers[1]
    return str(caught.value)


def rewritten(path, folder, change):
    """A checkpoint with another content."""
    content = torch.load(path, weights_only=True)
    change(content)
    with (folder / "rewritten.pt").open("wb") as file:
        write_summed(file, content)
    return folder / "rewritten.pt"
