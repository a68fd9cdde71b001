"""Finds layers that the user has replaced, removed or moved after the model was compressed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from compress_core.contract.statistics import Statistics, Table
from compress_core.errors import UsageError
from compress_core.transforms.chain import TransformChain
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, TRANSFORMS_ATTRIBUTE

logger = logging.getLogger(__name__)

NAME = "replaced_layers"

# (name of the layer, place in the layer, key of the transform)
_Place: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True)
class ReplacedLayers(Statistics):
    """Layers that have lost their transforms, because the user has replaced or removed them.

    Attributes:
        layers: Dotted name of a layer -> the algorithms whose transforms it had.
    """

    layers: dict[str, list[str]]

    def tables(self) -> Sequence[Table]:
        """Returns a table of the layers."""
        rows = [(name or "model", ", ".join(keys)) for name, keys in self.layers.items()]
        return [Table("Replaced or removed since creation, not compressed", ("layer", "was compressed by"), rows)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the layers."""
        return {"layers": self.layers}


class TransformPlaces:
    """Where a model has transforms.

    Args:
        model: The model, when it has been created.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = _places(model)
        self._said: set[str] = set()

    def replaced(self) -> dict[str, list[str]]:
        """Returns the layers that have lost transforms, with the keys of these; logs a warning for new ones.

        A layer that was replaced by another one that is in the model already has lost its own transforms, too.

        Raises:
            UsageError: A layer was moved: it is still compressed, but no algorithm finds it under its new name.
        """
        now = _places(self._model)
        lost = (self._places.keys() - now.keys()) | self._merged(now)
        moved = {(where, key): layer for layer, where, key in now.keys() - self._places.keys()}
        for layer, where, key in sorted(lost):
            if (where, key) in moved:
                raise UsageError(
                    f"'{layer}' was moved to '{moved[where, key]}' after create_compressed_model, and '{key}' finds "
                    "its transforms by name. Move it back, or arrange the model first and compress it then"
                )
        found: dict[str, list[str]] = {}
        for layer, _, key in sorted(lost):
            found.setdefault(layer, []).append(key)
        found = {layer: sorted(set(keys)) for layer, keys in found.items()}
        if new := sorted(found.keys() - self._said):
            self._said.update(new)
            logger.warning(
                "%d layers were replaced or removed after create_compressed_model, such as %s: they have lost their "
                "transforms, and a new layer is not compressed; controller.statistics() lists them",
                len(new),
                new[:3],
            )
        return found

    def _merged(self, now: dict[_Place, int]) -> set[_Place]:
        """Returns the places that had transforms of their own and now have that of another place."""
        first: dict[int, int] = {}
        places = [place for place in self._places if place in now]
        return {place for place in places if first.setdefault(now[place], self._places[place]) != self._places[place]}

    def refuse(self, what: str) -> None:
        """Raises UsageError if layers were replaced, because `what` describes the model as it was created."""
        replaced = self.replaced()
        if replaced:
            raise UsageError(
                f"{what}: the layers {sorted(replaced)[:3]} were replaced or removed after create_compressed_model, so "
                "the model could not be built again like this. Replace layers first, then compress the model"
            )


def _places(model: nn.Module) -> dict[_Place, int]:
    """Returns where transforms are, with a number that is the same for all places of one transform."""
    found: dict[_Place, int] = {}
    numbers: dict[int, int] = {}
    for name, chain in model.named_modules(remove_duplicate=False):
        if isinstance(chain, TransformChain):
            parts = name.split(".")
            at = max(i for i, part in enumerate(parts) if part in (TRANSFORMS_ATTRIBUTE, ACTIVATIONS_ATTRIBUTE))
            layer, where = ".".join(parts[:at]), ".".join(parts[at:])
            for key, transform in chain._modules.items():
                found[layer, where, key] = numbers.setdefault(id(transform), len(numbers))
    return found
