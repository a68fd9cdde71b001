"""Staged quantization: quantizers of weights and of activations are turned on in different epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_core import CompressionStage
from compress_core.contract.clock import Clock
from compress_core.saved import damaged, shown
from compress_quantization.config import QuantizerGroup, StagedParams

_GROUPS: tuple[QuantizerGroup, ...] = ("weights", "activations")


class StagedQuantization:
    """Keeps track of which groups of quantizers are on.

    A group is turned on in the epoch that the config names (immediately if that is 0), and stays on. The caller has to
    measure ranges again whenever a group is turned on (`epoch_step`).

    Args:
        params: The section `params`; it must have a value (`StagedParams.staged`).
    """

    def __init__(self, params: StagedParams) -> None:
        self._start: dict[QuantizerGroup, int] = {
            "weights": params.weights_quant_start_epoch,
            "activations": params.activations_quant_start_epoch,
        }
        self._on = {group: start == 0 for group, start in self._start.items()}

    def is_on(self, group: QuantizerGroup) -> bool:
        """Returns whether the quantizers of a group are on."""
        return self._on[group]

    def epoch_step(self, clock: Clock) -> tuple[QuantizerGroup, ...]:
        """Begins an epoch; epochs may be skipped.

        Returns:
            The groups that are turned on in this epoch.
        """
        begun = tuple(group for group in _GROUPS if not self._on[group] and clock.epoch >= self._start[group])
        self._on.update(dict.fromkeys(begun, True))
        return begun

    @property
    def compression_stage(self) -> CompressionStage:
        """Returns UNCOMPRESSED with no group on, PARTIALLY_COMPRESSED with one, FULLY_COMPRESSED with both."""
        return CompressionStage(sum(self._on.values()))

    def get_state(self) -> dict[str, Any]:
        """Returns which groups are on; JSON-able."""
        return {"on": dict(self._on)}

    def load_state(self, state: Mapping[str, Any], path: str = "staging") -> None:
        """Restores the state that `get_state` returned.

        Args:
            state: The state.
            path: Where it is, for messages.

        Raises:
            StateError: `state` was not returned by `get_state`.
        """
        on = state.get("on") if isinstance(state, Mapping) else None
        if not isinstance(on, Mapping) or set(on) != set(_GROUPS) or not all(isinstance(v, bool) for v in on.values()):
            raise damaged(f"{path}.on", f"must say True or False for {' and '.join(_GROUPS)}, got {shown(on)}")
        self._on = {group: on[group] for group in _GROUPS}
