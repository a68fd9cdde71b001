"""Base classes of transforms, with which a transform declares its capabilities.

Any `torch.nn.Module` that keeps the shape of a tensor can be a transform. What the core can do with it beyond calling
it (compute it again, let it take over the function before it, make it smaller with its weight) is
declared here, in attributes with one meaning each. A module that derives from none of these classes has none of these
capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compress_core.transforms.activation_functions import ACTIVATION_FUNCTIONS


class Transform(nn.Module):
    """Base class of transforms of weights and of activations.

    Attributes:
        follows: How the tensors of the transform are cut when channels of the weight or activation are removed: name of
            a parameter or buffer (dotted, if it belongs to a submodule) -> one of

            * `"weight"`: the tensor broadcasts against the weight, aligned from the last dimension. A dimension of the
              same size as the weight's is cut like it; one of size 1 stays. For masks, scores, scales.
            * `"channels"`: the tensor has one value for each output channel along one dimension; all others have size
              1. Output channels are dimension 0 of a weight, dimension 1 of transposed convolutions and embeddings.
              For an activation, the trace finds the channels.
            * `"fixed"`: the tensor does not depend on any size of the weight or activation. For codebooks, thresholds.

            Every tensor of more than one element has to be listed, otherwise channels cannot be removed. The core does
            not guess from sizes, because a codebook of 15 entries is not related to a weight with 15 inputs. Names of
            tensors that do not exist (yet) are allowed.
        lr_multiplier: By what `forward` multiplies the gradients of the transform's parameters (`scaled_gradient`), if
            its algorithm declares `applies_lr_multiplier`. The core sets it: to what the config says, and to 1 when the
            factor has become one of learning rates (`controller.parameter_groups`).
    """

    follows: ClassVar[Mapping[str, str] | None] = None
    lr_multiplier: float = 1.0


class WeightTransform(Transform):
    """Base class of transforms of weights: `forward` maps a weight to one of the same shape.

    Attributes:
        recomputable: In training and eval mode the result depends only on the weight, on the transform's own parameters
            and buffers, and on attributes that are replaced (not mutated) when they change, and `forward` changes no
            attribute. The core may compute the result again in the backward pass.
        depends_on_whole_tensor: The result for an element depends on other elements (top-k of scores, clustering, a
            norm), so it would change if the weight were cut. The class implements `freeze_decision`, which sets this
            to False for the instance.
    """

    recomputable: ClassVar[bool] = False
    depends_on_whole_tensor: bool = False

    def shrunk_dims(
        self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], kept: Mapping[int, Sequence[int]]
    ) -> Mapping[int, Sequence[int]] | None:
        """Returns which indices stay of a tensor that `follows` does not list, for rules that it cannot express.

        Args:
            name: Name of the parameter or buffer in this transform, dotted if it belongs to a submodule.
            tensor: The tensor before it is cut.
            shape: Shape of the weight before it is cut.
            kept: Dimension of the weight -> indices along it that stay, ascending; other dimensions stay whole.

        Returns:
            Dimension of the tensor -> indices that stay, ascending; an empty dict leaves it whole. None: not declared.
        """
        return None

    def freeze_decision(self, weight: torch.Tensor) -> None:
        """Stores the decision over the whole weight in tensors that can be cut with the weight.

        Afterwards the transform computes the same for this weight as before, from tensors that `follows` lists (for
        example a buffer with the mask of the top-k scores), and `depends_on_whole_tensor` is False.

        Args:
            weight: The present argument of `forward`: the stored weight after earlier transforms, detached.

        Raises:
            NotImplementedError: The transform cannot do this; then channels of its weight are not removed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no freeze_decision(weight)")

    def adopted(
        self, others: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> tuple[set[str], Mapping[str, torch.Tensor]] | None:
        """Returns what to load from a checkpoint that has no entries of this transform, but of others at its weight.

        Called by `load_state_dict`, for a transform that can make something of what another algorithm has saved. What
        it does not take is left, and torch reports it.

        Args:
            others: Key of a transform that this weight does not have -> the names of its tensors -> the tensors.

        Returns:
            The keys that are used, and this transform's own entries, all of them; None if there is nothing to take.
        """
        return None


@dataclass(frozen=True)
class WeightGrid:
    """The values that the elements of a weight may have: `scale * (integer - zero_point)`.

    Attributes:
        scale: Distance between neighbouring values, positive; broadcasts to the weight.
        zero_point: The integer that represents 0; broadcasts to the weight.
        low: The smallest integer.
        high: The largest integer.
        adjustable: Whether `set_scale` of the transform may be called.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    low: int
    high: int
    adjustable: bool = False


class ProjectingTransform(WeightTransform):
    """Base class of weight transforms that say which weights they allow: masks, grids.

    `forward` maps a weight to the nearest allowed one, and an allowed one to itself. What computes better weights for a
    compressed model can then search among the allowed ones, without knowing the transform. Several of them in a chain
    compose: the supports are intersected, and the chain as a whole is the projection. A transform for which this does
    not hold (it adds something, mixes elements, is random) must not derive from this class; its weights are left alone.
    """

    def support(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Returns which elements may differ from zero: boolean, broadcasts to the weight; None if all may.

        Args:
            weight: The stored weight after earlier transforms, detached.
        """
        return None

    def allowed_values(self, weight: torch.Tensor) -> WeightGrid | None:
        """Returns the values that elements may have; None if any.

        Args:
            weight: The stored weight after earlier transforms, detached.
        """
        return None

    def set_scale(self, scale: torch.Tensor) -> None:
        """Sets the distance of the grid's values, if `allowed_values` says that it is adjustable.

        Args:
            scale: Positive values in the shape of `WeightGrid.scale`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no set_scale(scale)")

    def project(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest allowed weight, detached; this implementation calls `forward`.

        Args:
            weight: Any values in the shape of the weight.
        """
        with torch.no_grad():
            allowed: torch.Tensor = self(weight.detach())
            return allowed


class ActivationTransform(Transform):
    """Base class of transforms of activations: `forward` maps a tensor to one of the same shape.

    Attributes:
        fused_activations: Names (in `ACTIVATION_FUNCTIONS`) of the activation functions that `fused` computes as well,
            if the transform comes directly after one of them.
        fuses_in_place: Whether `fused_in_place` does the same for in-place activation functions.
        computes_activation: Name (in `COMPUTABLE_ACTIVATIONS`) of the activation function in whose place the transform
            stands; empty if in none's. `forward` then takes the argument of the function, and its result takes the
            place of the function's result; the function itself is called only while transforms are bypassed. Such a
            transform is added at the `CallOutput` of its function, one at each place, and comes before all others of
            the place, whatever their stages. This is no optimization: where the core cannot hand it the argument, the
            forward raises `TransformError`.
        owns_input: Whether `forward_owned` may be called, which overwrites its argument; the core calls it if the
            tensor has no other reader.
        label: The name under which users know it, which `ignored_scopes` takes; for messages. An algorithm sets it.
    """

    fused_activations: ClassVar[frozenset[str]] = frozenset()
    fuses_in_place: ClassVar[bool] = False
    owns_input: ClassVar[bool] = False
    computes_activation: ClassVar[str] = ""
    label: str = ""

    def fused(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Returns `self(ACTIVATION_FUNCTIONS[activation](x))`; override it to compute both in one pass.

        Args:
            x: The input of the activation function.
            activation: Name of the function, one of `fused_activations`.
        """
        result: torch.Tensor = self(ACTIVATION_FUNCTIONS[activation](x))
        return result

    def fused_in_place(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Returns the result of `fused`, and writes either the activated value or this result to `x`.

        The forward may use `x` afterwards. Arguments are those of `fused`.
        """
        result: torch.Tensor = self(ACTIVATION_FUNCTIONS[activation](x, inplace=True))
        return result

    def forward_owned(self, x: torch.Tensor) -> torch.Tensor:
        """Does what `forward` does; may overwrite `x` unless autograd records, because `x` has no other reader."""
        result: torch.Tensor = self(x)
        return result
