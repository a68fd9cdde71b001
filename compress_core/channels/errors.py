"""What goes wrong when channels are removed."""

from __future__ import annotations

from compress_core.errors import ModelError


class ShrinkError(ModelError):
    """Channels cannot be removed: the smaller model would not compute what the masked one does, or nothing tells.

    The model has not been changed.

    Attributes:
        module: Dotted name of the module where that showed first.
        reference: Whether the masked model failed already, on the random inputs.
    """

    def __init__(self, message: str, module: str = "", *, reference: bool = False) -> None:
        super().__init__(message)
        self.module, self.reference = module, reference
