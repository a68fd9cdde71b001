"""The loop that a library's trainer stands for: what it was given, trained without it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from examples.common.datasets import digits

SAMPLES = 192
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.2,
    "params": {
        "schedule": "polynomial",
        "sparsity_target": 0.7,
        "sparsity_target_epoch": 2,
        "update_per_optimizer_step": True,
        "steps_per_epoch": 6,
    },
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 64}},
}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 64}}}
PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.25,
    "params": {"pruning_target": 0.5, "pruning_steps": 2, "multiple_of": 1},
}
CONFIG = {"input_info": {"sample_size": [1, 1, 8, 8]}, "compression": [PRUNING, SPARSITY, QUANTIZATION]}
# With an algorithm that has a loss of its own, see conftest.
PENALTY = {"input_info": CONFIG["input_info"], "compression": [{**SPARSITY, "params": {}}, {"algorithm": "penalty"}]}


def images(samples=SAMPLES):
    """Images and labels of the digits."""
    inputs, labels = digits().train
    return inputs[:samples], labels[:samples]


def calibration():
    """Batches for creation."""
    return [images(64)]


class Network(nn.Module):
    """A small network; its weights depend on the seed alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


class Labelled(Network):
    """The same with the interface of Hugging Face's models."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = super().forward(images)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def compressed(kind=Network, state=None, config=CONFIG):
    """Returns controller and model."""
    return create_compressed_model(kind(), copy.deepcopy(config), state, init_loader=calibration())


def parameter_groups(model, decay):
    """Weights with decay, scales and the rest without."""
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if "_transforms." not in n and p.ndim > 1]
    others = [p for n, p in named.items() if "_transforms." in n or p.ndim <= 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def sgd(model):
    """The optimizer of all loops."""
    return torch.optim.SGD(parameter_groups(model, 1e-3), lr=0.05, momentum=0.9)


def train(controller, model, optimizer, epochs, steps_per_epoch=6, micro_batches=2, batch=16, precision=None):
    """Trains on the images in their order; each optimizer step has so many micro-batches."""
    inputs, labels = images()
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        model.train()
        for step in range(steps_per_epoch):
            controller.scheduler.step()
            for micro in range(micro_batches):
                begin = (step * micro_batches + micro) * batch
                part = slice(begin, begin + batch)
                with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                    logits = model(inputs[part])
                    loss = F.cross_entropy(logits.float(), labels[part])
                ((loss + controller.loss()) / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def masks_and_scales(model):
    """What compression has made of the model."""
    return {n: v for n, v in model.state_dict().items() if "_transforms." in n}


def saved_state(controller):
    """What a controller saves, but for the seconds that initializers took."""
    state = controller.get_compression_state()
    return state["algorithms"], state["scheduler"]


def assert_same_state(one, two):
    """Asserts two models with the same bits."""
    left, right = one.state_dict(), two.state_dict()
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:5]


# With a loss that needs the batch, and a factor on gradients that Adam undoes.
DISTILLED = {
    "input_info": CONFIG["input_info"],
    "compression_lr_multiplier": 0.5,
    "compression": [
        {**SPARSITY, "params": {}},
        QUANTIZATION,
        {
            "algorithm": "knowledge_distillation",
            "type": "softmax",
            "features": [{"student": "bn2", "type": "attention"}],
        },
    ],
}
