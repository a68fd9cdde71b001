"""The base class of algorithms, and the plans that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compress_core.config.sections import AlgorithmConfig
from compress_core.contract.stages import Stage


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
        changes_in_place: Whether commit or calibration write to parameters and buffers or replace modules, instead of
            adding transforms. Such changes cannot be bypassed, so data-driven initializers need a pass over the model
            before them.
        reads_later: Values of the section (dotted, as `params.rate`) that are first read in training, such as in
            `compress_loss`: they count as having an effect although nothing has read them when the model is created.
        controller_api: Names of public methods and attributes that the controller offers as its own.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    stage: ClassVar[Stage]
    changes_in_place: ClassVar[bool] = False
    reads_later: ClassVar[tuple[str, ...]] = ()
    controller_api: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    @property
    def compression_rate(self) -> float | None:
        """Share of what it compresses that is gone, 0 to 1, measured; None when that means nothing here."""
        return None
