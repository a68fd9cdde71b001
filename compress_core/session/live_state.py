"""Brings a controller that exists to a compression state that was saved of the same structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from compress_core.errors import StateError
from compress_core.registry import default_registry
from compress_core.session.checkpoint_parts import check_entries, loading
from compress_core.session.history import History
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.same_algorithms import check_same_algorithms, differing
from compress_core.session.scheduler import CompressionScheduler
from compress_core.session.state import check_plan, checked_state


class LiveState:
    """The state of a model's algorithms, and how to bring them to another one; call it within a transaction.

    Args:
        model: The compressed model.
        lifecycle: Its algorithms.
        scheduler: Its scheduler.
        history: Its history.
        current: Returns the present compression state.
    """

    def __init__(
        self,
        model: nn.Module,
        lifecycle: Lifecycle,
        scheduler: CompressionScheduler,
        history: History,
        current: Callable[[], dict[str, Any]],
    ) -> None:
        self._model, self._lifecycle, self._scheduler, self._current = model, lifecycle, scheduler, current
        self._history = history

    def load(self, state: Any, weights: Mapping[str, Any], what: str, remedy: str) -> None:
        """Loads what the algorithms know, the weights, the clock and the history.

        Args:
            state: The compression state.
            weights: The `state_dict` of the model that belongs to it.
            what: Where they were saved, for messages.
            remedy: What to do if they do not fit.

        Raises:
            StateError: They do not fit.
        """
        check_same_algorithms(state, self._current(), what, remedy)
        before = [id(parameter) for parameter in self._model.parameters()]
        try:
            saved = checked_state(state, self._lifecycle, default_registry())
            for name, plan in self._lifecycle.plans.items():
                check_plan(saved, name, plan)
            # As when a model is created from a state: first the structure, then the weights, which have the last word.
            others = differing(state, self._current(), "state")
            self._lifecycle.load_state(self._model, {name: saved.algorithms[name].state for name in others})
            self._lifecycle.load_initializers(self._model, saved.initializers)
            check_entries(self._model, weights, f"model of {what}")
        except StateError as error:
            raise StateError(f"{what} does not fit: {error}. {remedy}") from error
        if before != [id(parameter) for parameter in self._model.parameters()]:
            raise StateError(f"{what} is of a model from which channels have been removed since. {remedy}")
        loading("model", what, self._model.load_state_dict, weights)
        loading("clock", what, self._scheduler.load_state, saved.scheduler)
        self._history.load(saved.history)
        # Only now, because algorithms may measure their state on the model.
        check_same_algorithms(state, self._current(), what, remedy, ("plan", "state"))
