"""The losses between a tensor of the student and the same tensor of the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from compress_core import ModelError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a tensor of the student and one of the teacher, in one dtype of at least 32 bits; returns a scalar."""

_AMBIGUOUS_DIMS = 3


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all elements of (teacher - student)^2, as NNCF computes it."""
    return F.mse_loss(student, teacher)


def softmax(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float, dim: int) -> torch.Tensor:
    """Returns T^2 times the cross entropy of the student's softmax at temperature T with the teacher's.

    The cross entropy is summed over the classes and averaged over everything else; the entropy of the teacher is not
    subtracted, as in NNCF, which changes no gradient (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a
    Neural Network", section 2). So the loss of a perfect student is T^2 times that entropy and not 0.

    Args:
        student: Logits.
        teacher: Logits.
        temperature: T.
        dim: The dimension of the classes.
    """
    logarithms = F.log_softmax(student / temperature, dim)
    wanted = F.softmax(teacher / temperature, dim)
    terms = (logarithms * wanted).masked_fill(wanted == 0, 0.0)  # a class that both rule out has 0 * -inf
    return -terms.sum(dim).mean() * temperature**2


def cosine(student: torch.Tensor, teacher: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Returns the mean of 1 - cos(student, teacher) along a dimension."""
    return (1 - F.cosine_similarity(student, teacher, dim)).mean()


def attention(student: torch.Tensor, teacher: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Returns the mean squared difference of attention maps, each divided by its norm.

    The map of a sample is the mean over the channels of the squared activations, as a vector over all positions
    (Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", F_sum^2 in section 3.1). As in the authors' code,
    the squared difference is averaged over samples and positions; their equation 2 has its norm.

    Args:
        student: Activations, samples in dimension 0.
        teacher: Activations; as many positions, any number of channels.
        dim: The dimension of the channels.
    """
    return F.mse_loss(_attention_map(student, dim), _attention_map(teacher, dim))


def _attention_map(x: torch.Tensor, dim: int) -> torch.Tensor:
    return F.normalize(x.square().mean(dim).flatten(1))


def dimension(given: int | None, tensor: torch.Tensor, *, key: str, what: str) -> int:
    """Returns the dimension of classes or channels of a tensor.

    Args:
        given: What the config says.
        tensor: The tensor.
        key: The key of the config, for messages.
        what: What the tensor is, for messages.

    Raises:
        ModelError: The config says nothing and the tensor has three dimensions, or the tensor has no such dimension.
    """
    shape = tuple(tensor.shape)
    if given is None and tensor.ndim == _AMBIGUOUS_DIMS:
        raise ModelError(
            f"{what} has the shape {shape}: which dimension holds the classes or channels is not clear with three. Set "
            f"{key}: -1 for sequences (samples, positions, channels), 1 for (samples, channels, positions)"
        )
    dim = 1 if given is None else given
    if not -tensor.ndim <= dim < tensor.ndim or dim % tensor.ndim == 0:
        raise ModelError(
            f"{what} has the shape {shape}: dimension {dim} of it cannot hold classes or channels (0 holds the "
            f"samples); set {key}, or choose the type mse"
        )
    return dim % tensor.ndim


def comparable(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both in one dtype of at least 32 bits, so that half precision rounds no loss, on the student's device."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if teacher.device != student.device:
        teacher = teacher.to(student.device)
    return student.to(dtype), teacher.to(dtype)
