"""The section `movement_sparsity`: NNCF's keys and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from compress_core import AlgorithmConfig, ConfigError, Count, Scopes, Section


class MovementSparsityParams(Section):
    """Section `params`."""

    warmup_start_epoch: Count = Field(ge=0, description="epoch at which the threshold begins to rise")
    warmup_end_epoch: Count = Field(ge=1, description="epoch at which the masks are final")
    importance_regularization_factor: float = Field(
        ge=0, description="weight of the loss that lowers all scores, at the end of the warm-up"
    )
    power: float = Field(3.0, gt=0, description="exponent of the polynomial along which threshold and loss rise")
    init_importance_threshold: float | None = Field(
        None,
        description="threshold at the beginning of the warm-up; by default one below which a thousandth of the scores "
        "are; NNCF's documentation calls it initial_importance_threshold, which is taken too",
    )
    final_importance_threshold: float = Field(0.0, description="threshold at the end of the warm-up")
    steps_per_epoch: Count | None = Field(
        None, gt=0, description="optimizer steps in an epoch; by default those of the epoch before"
    )
    enable_structured_masking: bool = Field(
        True, description="whether channels and heads that are masked everywhere are removed at the end"
    )

    @model_validator(mode="before")
    @classmethod
    def _other_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "initial_importance_threshold" in values:
            if "init_importance_threshold" in values:
                raise ValueError("initial_importance_threshold and init_importance_threshold are the same; remove one")
            values = dict(values)
            values["init_importance_threshold"] = values.pop("initial_importance_threshold")
        return values

    def check(self) -> None:
        """Refuses epochs that contradict one another; call it on a copy (`unread`).

        Raises:
            ConfigError: With the path below the algorithm's section.
        """
        if self.warmup_start_epoch >= self.warmup_end_epoch:
            raise ConfigError(
                f"is {self.warmup_end_epoch}, and the warm-up starts at epoch {self.warmup_start_epoch}; it has to end "
                "later",
                path="params.warmup_end_epoch",
            )
        if self.warmup_start_epoch < 1 and self.steps_per_epoch is None:
            raise ConfigError(
                "is 0, and how many steps the first epoch has is not known then; give params.steps_per_epoch, or start "
                "at epoch 1",
                path="params.warmup_start_epoch",
            )


class SparseStructure(Section):
    """An entry of `sparse_structure_by_scopes`."""

    mode: Literal["fine", "block", "per_dim"] = Field(
        description="a score for each weight, for each block, or for each row or column"
    )
    sparse_factors: list[Count] | None = Field(None, description="block: rows and columns of a block")
    axis: Literal[0, 1] | None = Field(None, description="per_dim: 0 for a score for each row, 1 for each column")
    target_scopes: Scopes = Field(description="the layers with this structure")

    @model_validator(mode="after")
    def _fits(self) -> SparseStructure:
        values = self.__dict__  # nothing counts as read
        factors, axis, mode = values["sparse_factors"], values["axis"], values["mode"]
        if (factors is not None) != (mode == "block"):
            raise ValueError("sparse_factors is for the mode 'block', and needed there: [rows, columns] of a block")
        if (axis is not None) != (mode == "per_dim"):
            raise ValueError("axis is for the mode 'per_dim', and needed there: 0 for rows, 1 for columns")
        if factors is not None and (len(factors) != 2 or min(factors) < 1):
            raise ValueError("sparse_factors takes two numbers from 1 on, rows and columns of a block")
        return self


class MovementSparsityConfig(AlgorithmConfig):
    """Section of the algorithm `movement_sparsity`."""

    algorithm: Literal["movement_sparsity"] = Field(description="name of the algorithm")
    params: MovementSparsityParams = Field(description="warm-up, thresholds and loss")
    sparse_structure_by_scopes: list[SparseStructure] = Field(
        default_factory=list, description="what one score stands for, by layer; by default a single weight"
    )
    compression_lr_multiplier: float | None = Field(
        None, gt=0, description="factor on the gradients of the scores; overrides the one at the top of the config"
    )
