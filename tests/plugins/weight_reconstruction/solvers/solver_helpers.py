"""Layers with known inputs and targets, and independent ways to solve for their weights, in numpy and float64."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from compress_weight_reconstruction.solvers import Moments, Normal


def layer(groups=1, rows=3, columns=5, positions=60, *, seed=0, dtype=torch.float64, noise=0.5):
    """Correlated inputs that are not centred, a weight, and targets that it does not reach: (inputs, weight, targets)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = (normal(groups, positions, columns) @ normal(groups, columns, columns) + 1.0).relu()
    weight = normal(groups, rows, columns)
    targets = inputs @ weight.mT + noise * normal(groups, positions, rows) + 2.0
    return inputs, weight, targets


def moments(inputs, targets, parts=1, *, centred=True) -> Moments:
    groups, _, columns = inputs.shape
    result = Moments(groups, columns, targets.shape[2], device="cpu", centred=centred)
    for u, t in zip(inputs.chunk(parts, 1), targets.chunk(parts, 1), strict=True):
        result.update(u, t)
    return result


def normal_of(inputs, targets, **options) -> Normal:
    return moments(inputs, targets, **options).finalize()


def mean_error(weight, inputs, targets, *, centred=True) -> np.ndarray:
    """Mean squared error of each output with the best bias (none if not centred), from the positions themselves."""
    error = (inputs.double() @ weight.double().mT - targets.double()).numpy()
    if centred:
        error = error - error.mean(1, keepdims=True)
    return (error**2).mean(1)


def damping_of(inputs, damping, *, centred=True) -> np.ndarray:
    u = inputs.double().numpy()
    power = ((u - u.mean(1, keepdims=True)) ** 2 if centred else u**2).mean(1)
    return damping * (power + 0.1 * power.mean(1, keepdims=True))


def row_by_row(inputs, weight, targets, support=None, damping=0.0, *, centred=True) -> np.ndarray:
    """Least squares of each row on its support as one tall system, damping as extra equations, with `lstsq`."""
    u, t, w = (x.double().numpy() for x in (inputs, targets, weight))
    if centred:
        u, t = u - u.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    ridge = np.sqrt(damping_of(inputs, damping, centred=centred) * u.shape[1])
    result = np.zeros_like(w)
    for g, r in itertools.product(range(w.shape[0]), range(w.shape[1])):
        kept = np.ones(w.shape[2], bool) if support is None else support[g, r].numpy()
        if kept.any():
            tall = np.concatenate([u[g][:, kept], np.diag(ridge[g])[:, kept]])
            right = np.concatenate([t[g][:, r], ridge[g] * w[g, r] * kept])
            result[g, r, kept] = np.linalg.lstsq(tall, right, rcond=None)[0]
    return result
