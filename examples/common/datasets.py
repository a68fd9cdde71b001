"""Data sets as tensors in memory: inputs float32 in [0, 1], labels int64."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.common.fetch import fetched


@dataclass(frozen=True)
class Dataset:
    """Training and test part of a data set.

    Attributes:
        name: What it is called on the command line.
        train: (inputs (n, channels, height, width), labels (n,)).
        test: Likewise.
        classes: Number of classes.
    """

    name: str
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int = 10

    def loader(self, *, train: bool, batch_size: int, shuffle: bool = False, seed: int = 0) -> DataLoader:
        """Returns a loader whose order depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        part = TensorDataset(*(self.train if train else self.test))
        return DataLoader(part, batch_size=batch_size, shuffle=shuffle, generator=generator)


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles; every fifth is for testing."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only this data set needs it

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(labels)) % 5 == 0
    return Dataset("digits", (inputs[~is_test], labels[~is_test]), (inputs[is_test], labels[is_test]))


def fashion_mnist() -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels."""
    folder = fetched("fashion-mnist")

    def part(prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()

    return Dataset("fashion-mnist", part("train"), part("t10k"))


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


def cifar10() -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels."""
    from PIL import Image  # noqa: PLC0415 - only this data set needs it

    folder = fetched("cifar10")

    def images(name: str) -> torch.Tensor:
        # One image a row: 1024 pixels of three channels.
        with Image.open(folder / name) as file:
            pixels = np.asarray(file.convert("RGB")).reshape(-1, 32, 32, 3)
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().contiguous() / 255

    def labels(name: str) -> torch.Tensor:
        return torch.tensor(json.loads((folder / name).read_text())).long()

    train = torch.cat([images(f"data_batch_{i}.png") for i in range(1, 6)])
    return Dataset(
        "cifar10",
        (train, labels("train_lables.json")),
        (images("test_batch.png"), labels("test_lables.json")),
    )


DATASETS = {"digits": digits, "fashion-mnist": fashion_mnist, "cifar10": cifar10}
