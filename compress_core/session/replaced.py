"""Finds layers that the user has replaced, removed or moved after the model was compressed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress_core.contract.statistics import Statistics, Table
from compress_core.errors import UsageError
from compress_core.transforms.chain import TransformChain
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, TRANSFORMS_ATTRIBUTE

logger = logging.getLogger(__name__)

NAME = "replaced_layers"


@dataclass(frozen=True)
class ReplacedLayers(Statistics):
    """Transforms that are no longer in the model, because the user has replaced or removed their layers.

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

        Raises:
            UsageError: A layer was moved: it is still compressed, but no algorithm finds it under its new name.
        """
        now = _places(self._model)
        lost, added = self._places - now, now - self._places
        moved = {(where, key): layer for layer, where, key in added}
        for layer, where, key in sorted(lost):
            if (where, key) in moved:
                raise UsageError(
                    f"'{layer}' was moved to '{moved[where, key]}' after create_compressed_model, and '{key}' finds its "
                    "transforms by name. Move it back, or arrange the model first and compress it then"
                )
        found: dict[str, list[str]] = {}
        for layer, _, key in sorted(lost):
            found.setdefault(layer, []).append(key)
        found = {layer: sorted(set(keys)) for layer, keys in found.items()}
        if new := sorted(found.keys() - self._said):
            self._said.update(new)
            logger.warning(
                "%d layers were replaced or removed after create_compressed_model, such as %s: what is there now is not "
                "compressed; controller.statistics() lists them",
                len(new),
                new[:3],
            )
        return found

    def refuse(self, what: str) -> None:
        """Raises UsageError if layers were replaced, because `what` describes the model as it was created."""
        replaced = self.replaced()
        if replaced:
            raise UsageError(
                f"{what}: the layers {sorted(replaced)[:3]} were replaced or removed after create_compressed_model, so "
                "the model could not be built again like this. Replace layers first, then compress the model"
            )


def _places(model: nn.Module) -> set[tuple[str, str, str]]:
    """Returns (name of the layer, place in the layer, key of the transform) of each transform at each of its places."""
    found = set()
    for name, chain in model.named_modules(remove_duplicate=False):
        if isinstance(chain, TransformChain):
            parts = name.split(".")
            at = max(i for i, part in enumerate(parts) if part in (TRANSFORMS_ATTRIBUTE, ACTIVATIONS_ATTRIBUTE))
            layer, where = ".".join(parts[:at]), ".".join(parts[at:])
            found.update((layer, where, key) for key, _ in chain.named_children())
    return found
