"""Traces of the Hessian of a loss, for each weight: Hutchinson's estimator.

For random signs v, the mean of v^T H v is the trace of H (Hutchinson, 1990; for networks Dong et al., 2020,
arXiv:1911.03852). H v is the gradient of g^T v, where g is the gradient of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compress_core import ModelError
from compress_core.data.progress import progress_bar
from compress_quantization.precision.outputs import ErrorKind

# So few estimates may agree by luck.
_FEWEST = 10
# Estimates that share the first derivatives of a batch.
_BLOCK = 8

Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Traces:
    """Estimated traces.

    Attributes:
        values: The trace of the part of the Hessian that belongs to each weight, float64.
        iterations: Number of random vectors.
        error: Standard error of the sum of the traces, relative to the sum.
    """

    values: tuple[float, ...]
    iterations: int
    error: float


def hessian_traces(
    weights: Sequence[torch.Tensor],
    losses: Sequence[tuple[Loss, float]],
    *,
    iterations: int,
    tolerance: float,
    seed: int = 0,
) -> Traces:
    """Returns the traces of the Hessian of a weighted sum of losses.

    Args:
        weights: Tensors that require gradients.
        losses: (a function that computes the loss of a batch, a scalar with a graph; its weight in the sum). They are
            called one after the other, so the graph of one batch is in memory at a time.
        iterations: The most random vectors.
        tolerance: Ends when the standard error of the sum of all traces, relative to it, is below this; not before 10.
        seed: Of the random vectors, which come from a generator of their own.

    Raises:
        ModelError: The loss has no second derivatives, or they are not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def estimates(count: int) -> list[list[float]]:
        vectors = [[_signs(weight, generator) for weight in weights] for _ in range(count)]
        return _block(weights, losses, vectors)

    return _averaged(estimates, iterations, tolerance)


def gauss_newton_traces(
    weights: Sequence[torch.Tensor],
    outputs: Sequence[tuple[Callable[[], Sequence[torch.Tensor]], float]],
    kind: ErrorKind,
    *,
    iterations: int,
    tolerance: float,
    seed: int = 0,
) -> Traces:
    """Returns the traces for the divergence of outputs from themselves, whose Hessian is J^T A J.

    With A = B B^T and random signs u, the trace is the mean of |J^T B u|^2. So first derivatives are enough, no
    estimate is negative, and weights do not disturb one another, as they do in v^T H v.

    Args:
        weights: Tensors that require gradients.
        outputs: (a function that computes the outputs of a batch with a graph, the weight of its divergence, see
            `outputs.divergence`, in the sum).
        kind: The divergence.
        iterations: See `hessian_traces`.
        tolerance: See `hessian_traces`.
        seed: See `hessian_traces`.

    Raises:
        ModelError: The outputs have no graph, or the traces are not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def estimates(count: int) -> list[list[float]]:
        totals = [[0.0] * len(weights) for _ in range(count)]
        with torch.enable_grad():
            for compute, share in outputs:
                found = [tensor for tensor in compute() if tensor.requires_grad]
                if not found:
                    raise ModelError(
                        "hawq needs derivatives, and no output of the model has a graph: its forward detaches them, or "
                        "runs under no_grad. The type 'sensitivity' needs none"
                    )
                for number in range(count):
                    seeds = [_factor(kind, tensor.detach(), _signs(tensor, generator)) for tensor in found]
                    gradients = torch.autograd.grad(
                        found, weights, seeds, retain_graph=number + 1 < count, allow_unused=True
                    )
                    for place, gradient in enumerate(gradients):
                        if gradient is not None:
                            totals[number][place] += share * float(gradient.double().square().sum())
        return totals

    return _averaged(estimates, iterations, tolerance)


def _factor(kind: ErrorKind, output: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Returns B u, where B B^T is the Hessian in the output: diag(p) - p p^T of the softmax, or the identity."""
    if kind == "squared":
        return signs
    p = torch.softmax(output, 1)
    root = p.sqrt()
    return root * signs - p * (root * signs).sum(1, keepdim=True)


def _averaged(estimates: Callable[[int], list[list[float]]], iterations: int, tolerance: float) -> Traces:
    """Returns the means of estimates, of which a function makes as many as it is asked for."""
    samples: list[list[float]] = []
    with progress_bar("precision search: traces of the Hessian", iterations, unit="vector") as bar:
        while len(samples) < iterations:
            for estimate in estimates(min(_BLOCK, iterations - len(samples))):
                samples.append(estimate)
                bar.update()
                if len(samples) >= _FEWEST and _relative_error(samples) < tolerance:
                    break
            else:
                continue
            break
    means = [math.fsum(column) / len(samples) for column in zip(*samples, strict=True)]
    if not all(map(math.isfinite, means)):
        raise ModelError("derivatives of the loss are not finite on the data; check data and weights")
    return Traces(tuple(means), len(samples), _relative_error(samples))


def _signs(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
    return signs.to(device=weight.device, dtype=weight.dtype).mul_(2).sub_(1)


def _block(
    weights: Sequence[torch.Tensor],
    losses: Sequence[tuple[Loss, float]],
    vectors: Sequence[Sequence[torch.Tensor]],
) -> list[list[float]]:
    """Returns v^T H v for each of the vectors and each weight."""
    totals = [[0.0] * len(weights) for _ in vectors]
    try:
        with torch.enable_grad():
            for loss, share in losses:
                gradients = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
                _refuse_dead_ends(gradients)
                for number, vector in enumerate(vectors):
                    products = _products(gradients, weights, vector, keep=number + 1 < len(vectors))
                    for place, (product, signs) in enumerate(zip(products, vector, strict=True)):
                        if product is not None:
                            totals[number][place] += share * float((product.double() * signs.double()).sum())
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"the loss has no second derivatives: {str(error).splitlines()[0]}. The type 'sensitivity' needs none"
        ) from error
    return totals


def _refuse_dead_ends(gradients: Sequence[torch.Tensor | None]) -> None:
    """Refuses first derivatives that cannot be differentiated: autograd takes them for constants without a word."""
    waiting = [gradient.grad_fn for gradient in gradients if gradient is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):  # what torch.autograd.function.once_differentiable leaves
            raise RuntimeError("an autograd function in the model is marked with once_differentiable")
        waiting += [parent for parent, _ in node.next_functions]


def _products(
    gradients: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    vector: Sequence[torch.Tensor],
    *,
    keep: bool,
) -> Sequence[torch.Tensor | None]:
    """Returns H v; None for weights that it does not depend on."""
    parts = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    if not parts:
        return [None] * len(weights)
    return torch.autograd.grad(
        [g for g, _ in parts], weights, [v for _, v in parts], retain_graph=keep, allow_unused=True
    )


def _relative_error(samples: Sequence[Sequence[float]]) -> float:
    totals = [math.fsum(sample) for sample in samples]
    if len(totals) < 2:
        return math.inf
    mean = math.fsum(totals) / len(totals)
    variance = math.fsum((total - mean) ** 2 for total in totals) / (len(totals) - 1)
    return math.sqrt(variance / len(totals)) / max(abs(mean), 1e-300) if variance else 0.0
