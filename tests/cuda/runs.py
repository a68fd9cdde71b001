"""One network, compressed and trained on a device."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from tests.plugins.filter_pruning.pruning_helpers import Chain

CPU = torch.device("cpu")


def batches(number=4, size=16):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator) + 0.2, torch.randint(0, 5, (size,), generator=generator))
        for _ in range(number)
    ]


@functools.cache
def _trained():
    torch.manual_seed(0)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for inputs, labels in batches() * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def network(device=CPU, dtype=torch.float32):
    """The same weights each time, after a few steps on the CPU."""
    return copy.deepcopy(_trained()).to(device=device, dtype=dtype)


class Run:
    """A compressed network with its optimizer.

    Args:
        sections: Of the config.
        device: Where it is created and trained; its data comes from the CPU.
        dtype: Of its weights and its data.
        state: A compression state to resume.
        model: Instead of `network`.
    """

    def __init__(self, sections, device=CPU, dtype=torch.float32, *, state=None, model=None):
        self.device, self.dtype = device, dtype
        config = {"target_device": "TRIAL", "input_info": {"sample_size": [4, 3, 8, 8]}, "compression": sections}
        data = {} if state else {"init_loader": [(inputs.to(dtype), labels) for inputs, labels in batches()]}
        model = network(device, dtype) if model is None else model
        self.controller, self.model = create_compressed_model(model, config, state, **data)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9)

    def loss(self, inputs, labels, run=None):
        outputs = (self.model if run is None else run)(inputs.to(self.device, self.dtype))
        return F.cross_entropy(outputs.float(), labels.to(self.device)) + self.controller.loss()

    def train(self, epochs=2, run=None):
        """Trains, and returns the losses; `run` is called instead of the model."""
        self.model.train()
        losses = []
        for _ in range(epochs):
            self.controller.scheduler.epoch_step()
            for inputs, labels in batches(2):
                self.controller.scheduler.step()
                self.optimizer.zero_grad()
                loss = self.loss(inputs, labels, run)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def outputs(self, model=None):
        model = (self.model if model is None else model).eval()
        with torch.no_grad():
            return model(batches(1)[0][0].to(self.device, self.dtype)).cpu()


def assert_close(found: dict, expected: dict, *, rtol: float, atol: float) -> None:
    """Compares state dicts of two devices: booleans and integers exactly."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[name].cpu(), value.cpu(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found[name].cpu(), value.cpu()), name


def assert_on(model: nn.Module, device: torch.device) -> None:
    """All that a model holds is on one device, buffers that no `state_dict` shows included."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [name for name, tensor in tensors.items() if tensor.device != device] == []
