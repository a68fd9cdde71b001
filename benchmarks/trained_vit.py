"""A small vision transformer, trained here on Fashion-MNIST and kept in the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.common.datasets import fashion_mnist
from examples.common.fetch import cache_folder
from examples.common.networks import VisionTransformer
from examples.common.training import augmented

EPOCHS, BATCH, LARGEST_RATE = 4, 128, 1e-3


class GreyVisionTransformer(nn.Module):
    """Gives grey images of 28x28 pixels to a vision transformer: 49 tokens of width 128, 4 blocks of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VisionTransformer(size=28, patch=4, width=128, depth=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x - 0.286).div(0.353).expand(-1, 3, -1, -1))


def vit_fashion() -> nn.Module:
    """Returns the trained network; the first call takes some minutes."""
    checkpoint = cache_folder() / f"vit-fashion-mnist-{EPOCHS}-epochs.pt"
    torch.manual_seed(0)
    model = GreyVisionTransformer()
    if not checkpoint.exists():
        _train(model)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), checkpoint)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def _train(model: nn.Module) -> None:
    loader = fashion_mnist().loader(train=True, batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), LARGEST_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_RATE, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(augmented(inputs, flip=True)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
