"""What numbers of bits cost: average bits, bit operations, or the size of a file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress_core import ConfigError
from compress_core.transforms import raw_parameter, transformed_weights
from compress_quantization.config import BudgetConfig
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.plan import BitsChoice

# The bits that count for an activation without a quantizer.
_UNQUANTIZED = 32


@dataclass(frozen=True)
class Budget:
    """The cost of numbers of bits, in whole units, and what it may be.

    Attributes:
        name: The key of the section `budget`.
        unit: What it is counted in, in words.
        value: The budget that the config gives.
        per_weight: (the weight, its bits, the bits of its activations) -> its cost in whole units.
        scale: Whole units in one of the config's.
        constant: Cost of everything else, in whole units.
    """

    name: str
    unit: str
    value: float
    per_weight: Callable[[BitsChoice, int, int], int]
    scale: float
    constant: float = 0.0

    def limit(self, value: float) -> int:
        """Returns the largest cost of all weights for a value in the config's unit."""
        return math.floor(value * self.scale * (1 + 1e-12) - self.constant)

    def used(self, cost: int) -> float:
        """Returns a cost of all weights in the config's unit."""
        return (cost + self.constant) / self.scale

    def cost(self, weights: Sequence[BitsChoice], bits: Mapping[str, int]) -> int:
        """Returns the cost of some weights.

        Args:
            weights: The weights.
            bits: Number of bits of each weight and of each activation in front of one.
        """
        return sum(self.per_weight(w, bits[w.name], bits_of_inputs(w, bits)) for w in weights)

    def refusal(self, least: int, most: int, path: str) -> ConfigError:
        """Returns the error for a budget that cannot be kept."""
        hint = "Give a larger budget, or more numbers in 'bits'"
        if self.name == "bit_operations" and self.used(most) > 1 + 1e-9:
            hint += (
                f"; activations without a quantizer, such as those of recurrent layers, count with {_UNQUANTIZED} "
                "bits: average_bits may say better what is meant"
            )
        return ConfigError(
            f"{self.value:g} cannot be kept: with the numbers of bits that can be chosen, {self.unit} is between "
            f"{_up(self.used(least))} and {_up(self.used(most))}. {hint}",
            path=f"{path}.{self.name}",
        )


def _up(value: float) -> str:
    """Returns a number with four digits that is not below it."""
    digits = 10.0 ** (3 - math.floor(math.log10(value))) if value > 0 else 1.0
    return f"{math.ceil(value * digits - 1e-9) / digits:g}"


def bits_of_inputs(weight: BitsChoice, bits: Mapping[str, int]) -> int:
    """Returns the number of bits of the activations that a weight is multiplied with: the largest of several."""
    return max((bits[name] for name in weight.inputs), default=_UNQUANTIZED)


def budget_of(config: BudgetConfig, weights: Sequence[BitsChoice], model: nn.Module, path: str) -> Budget:
    """Returns the budget that a section describes.

    Args:
        config: The section.
        weights: All weights with a quantizer.
        model: The model.
        path: Path of the section, for messages.

    Raises:
        ConfigError: It has no meaning for this model.
    """
    name, value = config.given
    elements = {w.name: raw_parameter(model, w.parameter).numel() for w in weights}
    if name == "average_bits":
        return Budget(
            name, "average bits of weights", value, lambda w, b, a: elements[w.name] * b, sum(elements.values())
        )
    if name == "bit_operations":
        operations = sum(weight.multiplications for weight in weights)
        if not operations:
            raise ConfigError("the model multiplies no activation with a quantized weight", path=f"{path}.{name}")
        text = "share of the bit operations with 8 bits"
        return Budget(name, text, value, lambda w, b, a: w.multiplications * b * a, operations * 64.0)
    stored = {id(raw_parameter(model, weight.parameter)) for weight in weights}
    others = sum(8 * t.numel() * t.element_size() for t in _in_a_file(model) if id(t) not in stored)
    return Budget(name, "file size in megabytes", value, lambda w, b, a: elements[w.name] * b, 8e6, float(others))


def _in_a_file(model: nn.Module) -> list[torch.Tensor]:
    """Returns the tensors that a file of the stripped model has, each once.

    Masks and scores of other algorithms are not among them, because `strip` bakes them into the weights.
    """
    baked = [
        t for weight in transformed_weights(model) for t in weight.chain.children() if not isinstance(t, FakeQuantize)
    ]
    gone = {id(tensor) for transform in baked for tensor in (*transform.parameters(), *transform.buffers())}
    saved = model.state_dict()
    own = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors = {id(tensor): tensor for name, tensor in own if name in saved}
    return [tensor for key, tensor in tensors.items() if key not in gone]
