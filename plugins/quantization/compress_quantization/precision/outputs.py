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


def mean_squares(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Returns the mean square of each output; 1 for one of zeros, which then counts by its change."""
    return [float(tensor.detach().double().square().mean()) or 1.0 for tensor in tensors]


def divergence(kind: ErrorKind, reference: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the error of one batch as a sum over it, a scalar; differentiable in `outputs`.

    `kl`: the sum over all positions of KL(softmax(reference) || softmax(output)); `squared`: half the sum of squares.

    Args:
        kind: The kind.
        reference: Outputs of the unquantized model.
        outputs: Outputs of the model, of the same shapes.
    """
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for ref, out in zip(reference, outputs, strict=True):
        wide = torch.promote_types(out.dtype, torch.float32)
        if kind == "kl":
            log_p, log_q = (F.log_softmax(tensor.to(wide), dim=1) for tensor in (ref, out))
            total = total + F.kl_div(log_q, log_p, reduction="sum", log_target=True).double()
        else:
            total = total + 0.5 * (out.to(wide) - ref.to(wide)).square().sum().double()
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
        self._sums: list[tuple[float, float]] = []

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
        is_kl = self._kind == "kl"
        self._sums = self._sums or [(0.0, 0.0)] * len(reference)
        for number, (ref, out) in enumerate(zip(reference, outputs, strict=True)):
            change, scale = self._sums[number]
            added = float(divergence(self._kind, [ref], [out]))
            size = ref.numel() / ref.shape[1] if is_kl else float(ref.double().square().sum())
            self._sums[number] = change + (added if is_kl else 2 * added), scale + size

    def value(self) -> float:
        """Returns the mean; infinite if an output was not finite."""
        if not all(math.isfinite(change) for change, _ in self._sums):
            return math.inf
        if self._kind == "kl":
            total = sum(change for change, _ in self._sums)
            return max(total, 0.0) / (sum(scale for _, scale in self._sums) or 1.0)
        relative = [change / (scale or 1.0) for change, scale in self._sums]
        return sum(relative) / max(len(relative), 1)
