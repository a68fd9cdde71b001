"""What the zoo knows of a model: how it is built, what its batches look like, and how its users call it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

KINDS = (
    "image classifiers",
    "vision transformers",
    "segmentation",
    "detection",
    "text encoders",
    "text decoders",
    "encoder-decoders",
    "vision and text",
    "audio",
    "time series",
    "diffusion",
    "medical and video",
    "recommenders",
)


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with the inputs of an (inputs, target) batch, or with a dict as keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch[0])


@dataclass(frozen=True)
class Case:
    """A model with random weights, and how it is used.

    Attributes:
        model: The model.
        batches: What the library's loader gives, batch by batch.
        loss: The library's own training step up to the loss.
        outputs: A forward in eval mode.
        forward_fn: What a user registers where the batches alone do not tell how the model is called; by default
            `outputs`.
    """

    model: nn.Module
    batches: list[Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    outputs: Callable[[nn.Module, Any], Any] = call
    forward_fn: Callable[[nn.Module, Any], Any] | None = None

    @property
    def help(self) -> Callable[[nn.Module, Any], Any]:
        """Returns the function to register."""
        return self.forward_fn or self.outputs


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Its name, as its library spells it.
        library: The package that it comes from.
        kind: One of `KINDS`.
        make: Builds it; raises ImportError if the package is missing.
    """

    name: str
    library: str
    kind: str
    make: Callable[[], Case]


def classifier(model: nn.Module, size: tuple[int, ...] = (3, 64, 64), classes: int = 10, samples: int = 2) -> Case:
    """Returns a classifier with batches (images, labels); classifiers that help in training add to the loss."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        found = [output for output in tensors(model(batch[0])) if output.ndim == 2]
        return torch.stack([F.cross_entropy(output, batch[1]) for output in found]).sum()

    batches = [(torch.randn(samples, *size), torch.randint(0, classes, (samples,))) for _ in range(2)]
    return Case(model, batches, loss)


def segmenter(model: nn.Module, size: tuple[int, int] = (64, 64), classes: int = 4) -> Case:
    """Returns a network that gives scores for each pixel, with batches (images, masks)."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        found = tensors(model(batch[0]))
        return torch.stack([F.cross_entropy(output, batch[1]) for output in found]).sum()

    batches = [(torch.randn(2, 3, *size), torch.randint(0, classes, (2, *size))) for _ in range(2)]
    return Case(model, batches, loss)


def tensors(structure: Any) -> list[torch.Tensor]:
    """Returns the floating-point tensors of a structure: tuples, lists, mappings and dataclasses in any nesting."""
    if isinstance(structure, torch.Tensor):
        return [structure] if structure.is_floating_point() else []
    if isinstance(structure, Mapping):
        parts: list[Any] = list(structure.values())
    elif isinstance(structure, (list, tuple)):
        parts = list(structure)
    elif is_dataclass(structure) and not isinstance(structure, type):
        parts = [getattr(structure, field.name) for field in fields(structure)]
    else:
        parts = list(structure) if type(structure).__name__ == "ValuesView" else []
    return [tensor for part in parts for tensor in tensors(part)]


_MODULES = ("small", "images", "detectors", "language", "sequences", "volumes")


def entries() -> Iterator[Entry]:
    """Yields all models, library by library."""
    for module in _MODULES:
        yield from importlib.import_module(f"benchmarks.zoo.{module}").entries()
