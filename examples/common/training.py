"""A plain training loop: what a user of compress-core already has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import CompressionController


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], batch_size: int = 500) -> float:
    """Returns the share of samples classified correctly, in percent; the model's mode stays."""
    was_training = model.training
    model.eval()
    correct = 0
    for inputs, labels in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
        correct += int((model(inputs).argmax(1) == labels).sum())
    model.train(was_training)
    return 100 * correct / len(data[1])


def augmented(inputs: torch.Tensor, *, flip: bool) -> torch.Tensor:
    """Shifts a batch by up to one pixel, and mirrors half of it if `flip`."""
    if flip:
        mirrored = torch.rand(len(inputs)) < 0.5
        inputs = torch.where(mirrored.view(-1, 1, 1, 1), inputs.flip(3), inputs)
    height, width = inputs.shape[2:]
    top, left = (int(offset) for offset in torch.randint(0, 3, (2,)))
    return F.pad(inputs, (1, 1, 1, 1))[:, :, top : top + height, left : left + width]


def train(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    epochs: int,
    max_lr: float,
    flip: bool = False,
    controller: CompressionController | None = None,
) -> None:
    """Trains with SGD and a one-cycle learning rate, and with compression if there is a controller."""
    batches = list(loader) if not hasattr(loader, "__len__") else loader
    optimizer = torch.optim.SGD(model.parameters(), max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, epochs * len(batches))  # type: ignore[arg-type]
    model.train()
    for _ in range(epochs):
        if controller is not None:
            controller.scheduler.epoch_step()
        losses = []
        for inputs, labels in batches:
            if controller is not None:
                controller.scheduler.step()
            loss = F.cross_entropy(model(augmented(inputs, flip=flip)), labels)
            if controller is not None:
                loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if controller is not None:
            controller.log_epoch(loss=torch.stack(losses).mean())
    model.eval()
