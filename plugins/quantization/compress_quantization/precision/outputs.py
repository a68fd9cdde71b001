"""How far outputs of a model are from those that it had: the error that searches for numbers of bits keep small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from compress_core import DataError
from compress_core.data.structures import tensors_of

ErrorKind = Literal["kl", "squared"]

IN_WORDS = {
    "kl": "mean divergence (KL, in nats) of the output's softmax from that of the unquantized model",
    "squared": "mean square of the output's change, relative to the mean square of the output",
}


def output_tensors(output: Any, path: str) -> list[torch.Tensor]:
    """Returns the floating-point tensors of what a forward has returned, in order.

    Raises:
        DataError: There is none; `path` is where the error is measured.
    """
    found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.numel()]
    if not found:
        raise DataError(
            f"{path}: the output of the model has no floating-point tensor, so its error cannot be measured; give a "
            "forward_fn that returns one: register_default_init_args(config, loader, forward_fn=...)"
        )
    return found


def kind_of_error(wanted: str, tensors: Sequence[torch.Tensor], path: str, *, auto: ErrorKind = "squared") -> ErrorKind:
    """Returns how the error of these outputs is measured; see `PrecisionConfig.output_error`.

    Args:
        wanted: What the config says.
        tensors: The outputs.
        path: Where it is said, for messages.
        auto: What `auto` stands for; `kl` only if the output is one tensor of two dimensions, scores of classes.

    Raises:
        DataError: `kl` is wanted, and an output has fewer than two classes in dimension 1.
    """
    are_scores = [tensor.ndim > 1 and tensor.shape[1] > 1 for tensor in tensors]
    if wanted == "auto":
        return "kl" if auto == "kl" and len(tensors) == 1 and tensors[0].ndim == 2 and are_scores[0] else "squared"
    if wanted == "kl" and not all(are_scores):
        shape = list(tensors[are_scores.index(False)].shape)
        raise DataError(
            f"{path}: 'kl' compares scores of classes in dimension 1, and an output has the shape {shape}; set "
            "'squared'"
        )
    return "kl" if wanted == "kl" else "squared"


def check_number(first: int, later: int) -> None:
    """Refuses batches for which a model returns another number of outputs than for the first one.

    Raises:
        DataError: The numbers differ.
    """
    if first != later:
        raise DataError(
            f"the model returns {first} floating-point tensors for one batch and {later} for another one, so that "
            "their error cannot be measured; give a forward_fn that returns as many for each batch"
        )


def norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Returns the root of the sum of squares of each output."""
    units = [_unit(tensor.detach()) for tensor in tensors]
    return [
        unit * math.sqrt(float((tensor.detach().double() / unit).square().sum()))
        for tensor, unit in zip(tensors, units, strict=True)
    ]


def _unit(*tensors: torch.Tensor) -> float:
    """Returns a power of two as large as the largest value, so that squares neither overflow nor become zero.

    In this unit no value is above 1 and the largest is at least 0.5. It is 1 if all values are zero.
    """
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    return math.ldexp(1.0, min(math.frexp(largest)[1], 1023)) if largest > 0 else 1.0


def divergence(kind: ErrorKind, reference: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the error of one batch as a sum over it, a scalar; differentiable in `outputs`.

    `kl`: the sum over all positions of KL(softmax(reference) || softmax(output)); `squared`: half the sum of squares.
    Computed in float64: a divergence is a small difference of large terms, which float32 rounds away.

    Args:
        kind: The kind.
        reference: Outputs of the unquantized model.
        outputs: Outputs of the model, of the same shapes.
    """
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for ref, out in zip(reference, outputs, strict=True):
        if kind == "kl":
            log_p, log_q = (F.log_softmax(tensor.double(), dim=1) for tensor in (ref, out))
            total = total + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        else:
            total = total + 0.5 * (out.double() - ref.double()).square().sum()
    return total


class MeanError:
    """The mean error over batches.

    `kl`: the mean over positions. `squared`: the mean over outputs of the sum of squares of each one's change, divided
    by that of its reference, so that boxes in pixels do not hide scores. On data that the network was trained on it is
    sure of its classes, and `kl` hardly sees an error there; `squared` is as large as elsewhere.

    Args:
        kind: The kind.
    """

    def __init__(self, kind: ErrorKind) -> None:
        self._kind = kind
        # Of each output the error, what it is divided by, and the unit whose square both are counted in.
        self._sums: list[tuple[float, float, float]] = []

    def update(self, reference: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Adds a batch."""
        same = len(reference) == len(outputs) and all(
            a.shape == b.shape for a, b in zip(reference, outputs, strict=True)
        )
        if not same:  # such as boxes of a detector, of which quantization makes more or fewer
            raise DataError(
                "the outputs of the model have other shapes once it is quantized, so that their error cannot be "
                "measured; give a forward_fn that returns tensors of fixed shapes, such as scores before they are "
                "selected"
            )
        self._sums = self._sums or [(0.0, 0.0, 0.0)] * len(reference)
        check_number(len(self._sums), len(reference))
        for number, (ref, out) in enumerate(zip(reference, outputs, strict=True)):
            self._sums[number] = _added(self._sums[number], self._of_batch(ref, out))

    def _of_batch(self, ref: torch.Tensor, out: torch.Tensor) -> tuple[float, float, float]:
        if not bool(out.isfinite().all()):
            return math.inf, 1.0, 1.0
        if self._kind == "kl":
            return float(divergence("kl", [ref], [out])), ref.numel() / ref.shape[1], 1.0
        unit = _unit(ref, out)
        ref, out = ref.double() / unit, out.double() / unit
        return 2 * float(divergence("squared", [ref], [out])), float(ref.square().sum()), unit

    def value(self) -> float:
        """Returns the mean; infinite if an output was not finite."""
        if not all(math.isfinite(change) for change, _, _ in self._sums):
            return math.inf
        if self._kind == "kl":
            total = sum(change for change, _, _ in self._sums)
            return max(total, 0.0) / (sum(scale for _, scale, _ in self._sums) or 1.0)
        relative = [change / scale if scale else change * unit * unit for change, scale, unit in self._sums]
        return sum(relative) / max(len(relative), 1)


def _added(old: tuple[float, float, float], new: tuple[float, float, float]) -> tuple[float, float, float]:
    """Returns the sum of two errors and scales, in the larger one of their units."""
    unit = max(old[2], new[2])
    shares = [(own / unit) ** 2 for *_, own in (old, new)]
    change, scale = (sum(part[n] * share for part, share in zip((old, new), shares, strict=True)) for n in (0, 1))
    return change, scale, unit
