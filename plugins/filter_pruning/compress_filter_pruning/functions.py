"""Calls of the functions that the user registered for searches of rankings."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_core import DataError, LeGRInitArgs
from compress_core.data.ranks import exchange, number_of_ranks
from compress_core.data.rng import preserved_rng


@contextlib.contextmanager
def same_chances(seed: int, *loaders: Any) -> Iterator[None]:
    """Context manager in which each candidate meets the same random numbers: batches, dropout, augmentation.

    The user's functions draw from the global generators, which are set here and are afterwards as they were before.
    """
    with preserved_rng(*loaders):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def validated(functions: LeGRInitArgs, model: nn.Module, path: str) -> tuple[float, float]:
    """Returns accuracy and loss of a model in eval mode; with several processes, the means over all of them.

    Args:
        functions: The registered functions.
        model: The model.
        path: Path of the config value, for messages.

    Raises:
        DataError: `validate_fn` returns something else than two numbers.
    """
    model.eval()
    with torch.no_grad():
        found = functions.val_fn(model, functions.val_loader)
    try:
        accuracy, loss = (float(value) for value in found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path}: validate_fn(model, loader) must return two numbers, accuracy and loss; got {str(found)[:80]}"
        ) from error
    return shared_mean("accuracy", accuracy), shared_mean("loss", loss)


def shared_mean(what: str, value: float) -> float:
    """Returns the mean over all processes, so that all of them choose the same ranking."""
    if number_of_ranks() == 1:
        return value
    values = exchange(f"ranking search: {what}", value)
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
