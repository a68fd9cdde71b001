"""What a transform declares about itself: the base classes that others derive from.

Any `torch.nn.Module` that keeps the shape of a tensor can be a transform. What the core can do with it beyond calling
it (compute it again, let it take over the function before it, make it smaller with its weight) is
declared here, in attributes with one meaning each. A module that derives from none of these classes has none of these
capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from compress_core.transforms.activation_functions import ACTIVATION_FUNCTIONS


class Transform(nn.Module):
    """What transforms of weights and of activations have in common.

    Attributes:
        follows: How each tensor of the transform follows when channels of what it transforms go: name of a parameter or
            buffer (dotted, where it is held by a module inside) -> one of

            * `"weight"`: it broadcasts against the weight, aligned from the last dimension. A dimension as large as the
              weight's loses what the weight's loses; one of size 1 stays. For masks, scores, scales.
            * `"channels"`: it has one value for each output channel, all along one dimension; the others have size 1.
              Output channels are dimension 0 of a weight, dimension 1 of transposed convolutions and embeddings.
              Of an activation they are what the trace finds.
            * `"fixed"`: it does not depend on any size of the weight or activation. For codebooks, thresholds.

            Every tensor of more than one element has to be named, or pruned channels cannot be removed from the model:
            sizes do not tell (a codebook of 15 entries says nothing about a weight with 15 inputs). Names of tensors
            that are not there (yet) do no harm.
    """

    follows: ClassVar[Mapping[str, str] | None] = None


class WeightTransform(Transform):
    """Base of transforms of weights: `forward` maps a weight to one of the same shape.

    Attributes:
        recomputable: Whatever the mode, the result depends on nothing but the weight, parameters and buffers of the
            transform, and attributes that are replaced when they change, not modified; and computing it changes no
            attribute. The core may compute it again for the backward pass.
        depends_on_whole_tensor: What happens to an element depends on others (top-k of scores, clustering, a norm), so
            that it would change when the weight is cut. Such a class implements `freeze_decision`, which sets this to
            False for the instance.
    """

    recomputable: ClassVar[bool] = False
    depends_on_whole_tensor: bool = False

    def shrunk_dims(
        self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], kept: Mapping[int, Sequence[int]]
    ) -> Mapping[int, Sequence[int]] | None:
        """Says what stays of a tensor that `follows` does not name; for what its words cannot say.

        Args:
            name: Name of the parameter or buffer in this transform, dotted where it is held by a module inside.
            tensor: The tensor as it is.
            shape: Shape of the weight as it is.
            kept: Dimension of the weight -> indices along it that stay, ascending; others stay whole.

        Returns:
            Dimension of the tensor -> indices that stay, ascending; an empty dict leaves it whole. None: not declared.
        """
        return None

    def freeze_decision(self, weight: torch.Tensor) -> None:
        """Makes what depends on the whole tensor a fixed decision, which can be cut with the weight.

        Afterwards the transform computes what it did before, for this weight, from tensors that `follows` names (such
        as a buffer with the mask that top-k of its scores has given), and `depends_on_whole_tensor` is False.

        Args:
            weight: What the transform is given now: the stored weight behind earlier transforms; without a graph.

        Raises:
            NotImplementedError: It cannot; then channels of such weights are not removed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no freeze_decision(weight)")


class ActivationTransform(Transform):
    """Base of transforms of activations: `forward` maps a tensor to one of the same shape.

    Attributes:
        fused_activations: Names (of `ACTIVATION_FUNCTIONS`) of the activation functions that `fused` takes over where
            the transform stands directly behind one.
        fuses_in_place: Whether `fused_in_place` takes over functions that work in place, too.
        owns_input: Whether `forward_owned` writes to its argument; it is called where nobody else has that.
    """

    fused_activations: ClassVar[frozenset[str]] = frozenset()
    fuses_in_place: ClassVar[bool] = False
    owns_input: ClassVar[bool] = False

    def fused(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Returns `self(ACTIVATION_FUNCTIONS[activation](x))`; worth overriding where that is one pass.

        Args:
            x: What the activation function takes.
            activation: Its name, one of `fused_activations`.
        """
        result: torch.Tensor = self(ACTIVATION_FUNCTIONS[activation](x))
        return result

    def fused_in_place(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Does what `fused` does, and leaves in `x` what the function would, or what is returned.

        Others may go on with `x`. Arguments are those of `fused`.
        """
        result: torch.Tensor = self(ACTIVATION_FUNCTIONS[activation](x, inplace=True))
        return result

    def forward_owned(self, x: torch.Tensor) -> torch.Tensor:
        """Does what `forward` does, and may write the result to `x`, which nobody else has, unless autograd records."""
        result: torch.Tensor = self(x)
        return result
