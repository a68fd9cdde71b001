"""The error for channels that cannot be removed."""

from __future__ import annotations

from compress_core.errors import ModelError


class ShrinkError(ModelError):
    """Channels cannot be removed: the smaller model would compute something else, or this cannot be checked.

    The model has not been changed.

    Attributes:
        module: Dotted name of the first module where the problem shows.
        reference: Whether already the masked model failed on the inputs.
        training: Whether the model works in eval mode, and the problem shows in training mode only.
    """

    def __init__(self, message: str, module: str = "", *, reference: bool = False, training: bool = False) -> None:
        super().__init__(message)
        self.module, self.reference, self.training = module, reference, training
