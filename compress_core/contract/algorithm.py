"""The base class of algorithms, and the plans that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from compress_core.config.sections import AlgorithmConfig
from compress_core.contract.stages import Stage
from compress_core.errors import UsageError

if TYPE_CHECKING:
    from compress_core.contract.context import Context

NeedsUncompressed = Literal["no", "creation", "training"]


@dataclass(frozen=True)
class Plan:
    """What an algorithm is going to change.

    Attributes:
        targets: Dotted names of what is changed, mostly of parameters.
        skipped: Dotted names of what could have been a target -> why it is not.
        details: Anything else that must be the same when a state is resumed; JSON-able.
    """

    targets: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-able values."""
        return {"targets": list(self.targets), "skipped": dict(self.skipped), "details": dict(self.details)}


class Algorithm:
    """Base class of a compression algorithm; one instance serves one model.

    A subclass sets the class attributes and implements hooks of `compress_core.contract.hookspecs` as methods marked
    with `@hookimpl`. `compress_plan` and `compress_commit` are required.

    Attributes:
        name: What `"algorithm"` in a config says.
        Config: The class of its section.
        stage: Where it stands in the pipeline.
        changes_in_place: Whether commit or calibration write to parameters and buffers, instead of adding transforms.
            Such changes cannot be bypassed, so data-driven initializers need a pass over the model before them.
        replaces_modules: Whether commit puts other modules in the place of the model's. It then plans and commits by
            itself, before the other algorithms of its stage, which plan on the new modules.
        needs_uncompressed: Whether it needs the model as it was before the first commit (`context.uncompressed()`):
            `"no"`, `"creation"` until the model has been created, or `"training"` as a frozen copy that lasts.
        needs_batch: Whether its `compress_loss` needs what the model was called with and what it returned.
        applies_lr_multiplier: Whether it multiplies the gradients of what it learns by `context.lr_multiplier(self)`; a
            config that asks for a multiplier is refused for an algorithm that learns something and does not.
        reads_later: Values of the section (dotted, as `params.rate`) that are first read in training, such as in
            `compress_loss`: they count as having an effect although nothing has read them when the model is created.
        controller_api: Names of public methods and attributes that the controller offers as its own.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    stage: ClassVar[Stage]
    changes_in_place: ClassVar[bool] = False
    replaces_modules: ClassVar[bool] = False
    needs_uncompressed: ClassVar[NeedsUncompressed] = "no"
    needs_batch: ClassVar[bool] = False
    applies_lr_multiplier: ClassVar[bool] = False
    reads_later: ClassVar[tuple[str, ...]] = ()
    controller_api: ClassVar[tuple[str, ...]] = ()

    _model: nn.Module | None = None
    _context: Context | None = None

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def attach(self, context: Context, model: nn.Module | None = None) -> None:
        """Called by the core: gives the algorithm its context, and its model before it plans."""
        self._context, self._model = context, model

    @property
    def model(self) -> nn.Module:
        """The model that is compressed; there is one from `compress_plan` on.

        Raises:
            UsageError: There is none yet.
        """
        if self._model is None:
            raise UsageError(f"'{self.name}' has no model before compress_plan()")
        return self._model

    @property
    def context(self) -> Context:
        """The context of this model's hooks; there is one from `compress_configure` on.

        Raises:
            UsageError: There is none yet.
        """
        if self._context is None:
            raise UsageError(f"'{self.name}' has no context before compress_configure()")
        return self._context

    @property
    def compression_rate(self) -> float | None:
        """Share of what it compresses that is gone, 0 to 1, measured; None when that means nothing here."""
        return None
