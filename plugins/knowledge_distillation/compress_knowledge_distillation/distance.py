"""The losses of a config as functions of two tensors, checked where they meet their first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress_core import ModelError
from compress_knowledge_distillation import losses
from compress_knowledge_distillation.config import FeaturePair, KnowledgeDistillationConfig

# Samples, channels, and at least one dimension of positions.
_DIMS_OF_ATTENTION = 3


@dataclass(frozen=True)
class Distance:
    """The loss between a tensor of the student and one of the teacher.

    Attributes:
        type: Name of the loss in the config.
        scale: Factor on it.
        key: Path of the config key with the dimension of classes or channels, for messages.
        dim: What this key says.
        temperature: For `softmax`.
    """

    type: str
    scale: float
    key: str
    dim: int | None = None
    temperature: float = 1.0

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, what: str) -> torch.Tensor:
        """Returns the loss, a scalar in the dtype of the student or, for half precision, in float32; 0 for no element.

        Args:
            student: The tensor that learns.
            teacher: The tensor that it learns from.
            what: What they are, for messages.

        Raises:
            ModelError: The two do not fit together, or not with this loss.
        """
        student, teacher = losses.comparable(student, teacher)
        self._check(student, teacher, what)
        if not student.numel():  # such as the boxes of images that show nothing; a mean over none is not a number
            return student.sum()
        if self.type == "mse":
            return self.scale * losses.mse(student, teacher)
        dim = losses.dimension(self.dim, student, key=self.key, what=what)
        if self.type == "softmax":
            return self.scale * losses.softmax(student, teacher, temperature=self.temperature, dim=dim)
        if self.type == "cosine":
            return self.scale * losses.cosine(student, teacher, dim=dim)
        return self.scale * losses.attention(student, teacher, dim=dim)

    def _check(self, student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
        own, other = tuple(student.shape), tuple(teacher.shape)
        needs = "the same positions" if self.type == "attention" else "the same shape"
        hint = ", or the type attention" if own[:1] == other[:1] and self.type != "attention" and len(own) > 2 else ""
        if self.type == "attention":
            if student.ndim < _DIMS_OF_ATTENTION:
                raise ModelError(
                    f"{what} has the shape {own} and so no positions to attend to; choose the type mse or cosine"
                )
            if student.ndim == teacher.ndim:
                dim = losses.dimension(self.dim, student, key=self.key, what=what)
                own, other = (own[:dim] + own[dim + 1 :], other[:dim] + other[dim + 1 :])
        if own != other:
            raise ModelError(
                f"{what} has the shape {tuple(student.shape)}, and the teacher's {tuple(teacher.shape)}; the type "
                f"{self.type} needs {needs}. Choose other layers or outputs{hint}"
            )


def distance_of_outputs(config: KnowledgeDistillationConfig) -> Distance | None:
    """Returns the loss between outputs, or None if the config asks for none; reads the values that it uses."""
    if config.type is None:
        return None
    dim = config.class_dim if config.type != "mse" else None
    temperature = config.temperature if config.type == "softmax" else 1.0
    return Distance(config.type, config.scale, "class_dim", dim, temperature)


def distance_of_features(pair: FeaturePair, number: int) -> Distance:
    """Returns the loss between layers of an entry of `features`; reads the values that it uses."""
    dim = pair.channel_dim if pair.type != "mse" else None
    return Distance(pair.type, pair.scale, f"features.{number}.channel_dim", dim)
