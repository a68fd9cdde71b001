"""Compression states: JSON-able, versioned, and checked against the model and config that they are loaded into."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress_core.config import AlgorithmConfig
from compress_core.contract.algorithm import Plan
from compress_core.errors import PluginError, StateError
from compress_core.registry import Registry
from compress_core.saved import STRICT, Items, check_plain, shown
from compress_core.session.history import SavedHistory
from compress_core.session.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

FORMAT = 1


def dump_state(
    lifecycle: Lifecycle, states: Mapping[str, Mapping[str, Any]], other_entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the compression state.

    Args:
        lifecycle: The model's algorithms.
        states: What `compress_state` returned, by algorithm.
        other_entries: Further entries, such as the state of the scheduler.

    Raises:
        PluginError: A state is not JSON-able; the message names the algorithm.
    """
    algorithms = {}
    for algorithm in lifecycle.algorithms:
        origin = lifecycle.origins[algorithm.name]
        algorithms[algorithm.name] = {
            "plugin": origin.name,
            "distribution": origin.distribution,
            "version": origin.version,
            "config": plain_config(algorithm.config),
            "plan": lifecycle.plans[algorithm.name].to_dict(),
            "state": _through_json(algorithm.name, states[algorithm.name]),
        }
    plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "algorithms": algorithms, **other_entries}))
    return plain


def plain_config(config: AlgorithmConfig) -> dict[str, Any]:
    """Returns the values of a section that were given, JSON-able."""
    # A function, such as a guard, is saved by name only, to show that there was one.
    return config.model_dump(
        mode="json", exclude_unset=True, fallback=lambda value: getattr(value, "__qualname__", type(value).__name__)
    )


def _through_json(name: str, state: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(state), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"the state of the algorithm '{name}' is not JSON-able ({error}); keep tensors in transforms"
        ) from error


class SavedPlan(BaseModel):
    """A plan as it was loaded from JSON."""

    model_config = STRICT

    targets: Items[str]
    skipped: dict[str, str] = {}
    details: dict[str, Any] = {}


class SavedAlgorithm(BaseModel):
    """The part of a compression state that belongs to one algorithm."""

    model_config = ConfigDict(strict=True)

    plugin: str = ""
    distribution: str = ""
    version: str = ""
    config: dict[str, Any]
    plan: SavedPlan
    state: dict[str, Any]


class SavedState(BaseModel):
    """A compression state that has been checked."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    algorithms: dict[str, SavedAlgorithm]
    scheduler: dict[str, Any]
    initializers: dict[str, dict[str, Any]] = {}
    # States of earlier versions have none.
    history: SavedHistory = SavedHistory()

    def plans(self) -> dict[str, Plan]:
        """Returns the plans by algorithm."""
        return {
            name: Plan(tuple(entry.plan.targets), entry.plan.skipped, entry.plan.details)
            for name, entry in self.algorithms.items()
        }


def checked_state(state: Any, lifecycle: Lifecycle, registry: Registry) -> SavedState:
    """Checks a state against the config and the installed plugins, and returns it parsed.

    Raises:
        StateError: It is not a compression state, has a newer format, or names other algorithms than the config.
    """
    if not isinstance(state, Mapping) or "algorithms" not in state:
        raise StateError("compression_state is not what controller.get_compression_state() returned")
    if type(state.get("format")) is not int or state["format"] != FORMAT:
        raise StateError(
            f"compression_state.format is {shown(state.get('format'))}, this version reads {FORMAT}; "
            "load it with the version of compress-core that wrote it"
        )
    for key, value in state.items():
        # Reports and configs may hold NaN and infinity; what decides about the structure may not.
        check_plain(value, f"compression_state.{key}", finite=key == "scheduler")
    _check_installed(state["algorithms"], registry)
    try:
        saved = SavedState.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StateError(
            f"compression_state.{place}: {first['msg']}; it is not what get_compression_state() returned"
        ) from error
    for name, entry in saved.algorithms.items():
        for part, value in {"plan": state["algorithms"][name]["plan"], "state": entry.state}.items():
            check_plain(value, f"compression_state.algorithms.{name}.{part}")
    active = {algorithm.name for algorithm in lifecycle.algorithms}
    if saved.algorithms.keys() != active:
        raise StateError(
            f"compression_state.algorithms: it is of the algorithms {sorted(saved.algorithms)}, the config names "
            f"{sorted(active)}; resume with the config that the state was saved with"
        )
    for algorithm in lifecycle.algorithms:
        _report_changes(algorithm.config, saved.algorithms[algorithm.name].config)
    return saved


def _check_installed(algorithms: Any, registry: Registry) -> None:
    for name, entry in algorithms.items() if isinstance(algorithms, Mapping) else ():
        if name not in registry.algorithms():
            origin = entry if isinstance(entry, Mapping) else {}
            raise StateError(
                f"compression_state needs the algorithm '{name}' of plugin '{origin.get('plugin', '?')}' "
                f"({origin.get('distribution', '?')} {origin.get('version', '?')}), which is not installed"
            )


def _report_changes(config: AlgorithmConfig, saved: Mapping[str, Any]) -> None:
    current = plain_config(config)
    changed = sorted(key for key in current.keys() | saved.keys() if current.get(key) != saved.get(key))
    if changed:
        logger.warning("%s: resumed with another config than the state's; changed: %s", config.algorithm, changed)


def check_plan(state: SavedState, name: str, plan: Plan) -> None:
    """Compares an algorithm's plan for this model with the plan in the state.

    Raises:
        StateError: They differ; the message names the first targets that only one of them has.
    """
    current, saved = list(plan.targets), state.algorithms[name].plan
    if current == saved.targets and _through_json(name, plan.details) == saved.details:
        return
    only_saved = [target for target in saved.targets if target not in current][:3]
    only_here = [target for target in current if target not in saved.targets][:3]
    raise StateError(
        f"compression_state.algorithms.{name}.plan.targets: compression_state does not fit this model: '{name}' was "
        f"made for {len(saved.targets)} targets and finds {len(current)} here (only in the state: {only_saved}, only "
        f"here: {only_here}). Build the model and use the scopes as when the state was saved"
    )
