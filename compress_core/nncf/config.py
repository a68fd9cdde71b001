"""`NNCFConfig`: a dict with NNCF's methods."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from compress_core.config import CompressionConfig
from compress_core.data import calibration
from compress_core.data.calibration import (
    BNAdaptationInitArgs,
    InitArgs,
    LeGRInitArgs,
    ModelEvaluationArgs,
    QuantizationRangeInitArgs,
)
from compress_core.errors import UsageError
from compress_core.nncf.structures import (
    AutoQPrecisionInitArgs,
    DistributedCallbacksArgs,
    ExecutionParameters,
    QuantizationPrecisionInitArgs,
    nncf_forward,
)
from compress_core.registry import default_registry
from compress_core.registry.schema import json_schema

logger = logging.getLogger(__name__)

Struct = TypeVar("Struct")


class NNCFConfig(dict[str, Any]):
    """A config document as a dict, which can be changed, and the objects that are registered with it.

    `from_json` and `from_dict` check the document, as with NNCF. What is changed afterwards is checked, unlike there,
    when the config is used: by `create_compressed_model` and the like.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._structs: dict[type, Any] = {}

    def copy(self) -> NNCFConfig:
        """Returns a config with the same values, and with the attached objects, to which others can be attached."""
        twin = type(self)(self)
        twin._structs = dict(self._structs)
        return twin

    __copy__ = copy

    @classmethod
    def from_dict(cls, nncf_dict: Mapping[str, Any]) -> NNCFConfig:
        """Returns a config from a dict, which is copied.

        Raises:
            ConfigError: The document is not valid.
        """
        return cls(CompressionConfig.from_dict(nncf_dict).source)

    @classmethod
    def from_json(cls, path: str | Path) -> NNCFConfig:
        """Reads a JSON file; comments and trailing commas are allowed.

        Raises:
            ConfigError: The file cannot be read, or is not valid.
        """
        return cls(CompressionConfig.from_json(path).source)

    @classmethod
    def validate(cls, loaded_json: Mapping[str, Any]) -> None:
        """Checks a document.

        Raises:
            ConfigError: It is not valid.
        """
        CompressionConfig.from_dict(loaded_json)

    @staticmethod
    def schema() -> dict[str, Any]:
        """Returns the JSON schema of everything that is installed."""
        return json_schema(default_registry())

    def register_extra_structs(self, struct_list: Iterable[object]) -> None:
        """Attaches objects that JSON cannot hold; unlike with NNCF, one replaces an earlier one of its type."""
        for struct in struct_list:
            self._structs[type(struct)] = struct

    def get_extra_struct(self, struct_cls: type[Struct]) -> Struct:
        """Returns the attached object of a type.

        Raises:
            UsageError: There is none.
        """
        if struct_cls not in self._structs:
            raise UsageError(f"no {struct_cls.__name__} was registered with this config; call register_extra_structs")
        found: Struct = self._structs[struct_cls]
        return found

    def has_extra_struct(self, struct_cls: type) -> bool:
        """Returns whether there is an attached object of a type."""
        return struct_cls in self._structs

    def get_all_extra_structs_for_copy(self) -> list[Any]:
        """Returns all attached objects."""
        return list(self._structs.values())

    def compression_config(self) -> CompressionConfig:
        """Returns the document as compress-core's config, checked as it is now, with the attached objects.

        Raises:
            ConfigError: The document is not valid.
        """
        config = CompressionConfig.from_dict(dict(self))
        config.register_extra_structs([_ours(struct) for struct in self._structs.values()])
        return config


def _ours(struct: Any) -> Any:
    """Returns what compress-core takes instead of a structure of NNCF; others as they are."""
    if isinstance(struct, QuantizationPrecisionInitArgs):
        forward = nncf_forward(struct.data_loader)
        return calibration.QuantizationPrecisionInitArgs(
            struct.data_loader, struct.device, forward, struct.criterion, struct.criterion_fn
        )
    if isinstance(struct, AutoQPrecisionInitArgs):
        forward = nncf_forward(struct.data_loader)
        return calibration.AutoQPrecisionInitArgs(struct.data_loader, None, forward, struct.eval_fn)
    if isinstance(struct, InitArgs) and struct.forward_fn is None:
        return replace(struct, forward_fn=nncf_forward(struct.data_loader))
    return struct


def register_default_init_args(
    nncf_config: NNCFConfig,
    train_loader: Any,
    criterion: Any = None,
    criterion_fn: Any = None,
    train_steps_fn: Any = None,
    validate_fn: Any = None,
    val_loader: Any = None,
    autoq_eval_fn: Any = None,
    model_eval_fn: Any = None,
    distributed_callbacks: Any = None,
    execution_parameters: Any = None,
    legr_train_optimizer: Any = None,
    device: Any = None,
) -> NNCFConfig:
    """Attaches the data and functions for initialization to a config, with NNCF's arguments.

    Args:
        nncf_config: The config.
        train_loader: Batches (input, target), or a loader with `get_inputs`.
        criterion: The loss, for mixed precision with a Hessian.
        criterion_fn: `(outputs, target, criterion)`; by default it calls the criterion.
        train_steps_fn: For learned ranking, with `val_loader` and `validate_fn`.
        validate_fn: `(model, loader)`, returns accuracy and loss: for learned ranking, and for adapted ranking, where
            NNCF has none, without `train_steps_fn`.
        val_loader: What `validate_fn` and `autoq_eval_fn` get.
        autoq_eval_fn: `(model, loader) -> number`, for mixed precision with an evaluation.
        model_eval_fn: `(model) -> number`, larger is better: the metric of `"guard": true`.
        distributed_callbacks: Not used, with a warning: nothing here wraps a model.
        execution_parameters: Not used, with a warning: batches are moved to where the model is; see `device`.
        legr_train_optimizer: For learned ranking.
        device: Device that batches are moved to; by default that of the model.

    Returns:
        The config. Unlike with NNCF, calling the function again replaces the data.

    Raises:
        UsageError: The config is no `NNCFConfig`, or an argument lacks another one.
    """
    if not isinstance(nncf_config, NNCFConfig):
        raise UsageError(f"nncf_config: got a {type(nncf_config).__name__}; NNCFConfig.from_dict(...) makes one")
    structs: list[Any] = [
        QuantizationRangeInitArgs(train_loader, device),
        BNAdaptationInitArgs(train_loader, device),
    ]
    if criterion is not None:
        compute = criterion_fn or (lambda outputs, target, criterion: criterion(outputs, target))
        structs.append(QuantizationPrecisionInitArgs(compute, criterion, train_loader, device))
    elif criterion_fn is not None:
        raise UsageError("criterion_fn: is of no use without criterion, which it would be called with; give both")
    if autoq_eval_fn is not None:
        loader = train_loader if val_loader is None else val_loader
        structs.append(AutoQPrecisionInitArgs(loader, autoq_eval_fn, nncf_config))
    structs += _for_searches(
        LeGRInitArgs(train_loader, train_steps_fn, legr_train_optimizer, val_loader, validate_fn, nncf_config)
    )
    if val_loader is not None and validate_fn is None and autoq_eval_fn is None:
        logger.warning("val_loader: is for validate_fn and autoq_eval_fn, and has no effect without them")
    if model_eval_fn is not None:
        structs.append(ModelEvaluationArgs(model_eval_fn))
    if distributed_callbacks is not None:
        structs.append(DistributedCallbacksArgs(*distributed_callbacks))
        logger.warning("distributed_callbacks: not used, because nothing here wraps a model for several GPUs")
    if isinstance(execution_parameters, ExecutionParameters) or execution_parameters is not None:
        structs.append(execution_parameters)
        logger.warning("execution_parameters: not used; batches are moved to the model, or to device=")
    nncf_config.register_extra_structs(structs)
    return nncf_config


def _for_searches(given: LeGRInitArgs) -> list[LeGRInitArgs]:
    """Returns the functions for searches of rankings, if there are any.

    Raises:
        UsageError: One lacks another one.
    """
    others = {"val_loader": given.val_loader, "validate_fn": given.val_fn}
    missing = [name for name, value in others.items() if value is None]
    if given.train_fn is not None and missing:
        raise UsageError(f"train_steps_fn: learned ranking needs {' and '.join(missing)}, too")
    if given.train_fn is None and given.train_optimizer is not None:
        raise UsageError("legr_train_optimizer: is of no use without train_steps_fn, val_loader and validate_fn")
    if given.val_fn is None:
        return []
    if missing:
        raise UsageError("validate_fn: is of no use without val_loader, which it would be called with; give both")
    return [given]  # without train_steps_fn for adapted ranking, which trains nothing
