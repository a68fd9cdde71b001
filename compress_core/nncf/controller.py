"""The controller and its scheduler with the methods that NNCF's scripts call besides."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress_core.contract.algorithm import Algorithm
from compress_core.contract.levels import LevelAlgorithm
from compress_core.contract.stages import CompressionStage
from compress_core.data.ranks import together
from compress_core.errors import StateError, UsageError
from compress_core.export import ExportReport
from compress_core.nncf.statistics import AlgorithmStatistics, NNCFStatistics
from compress_core.session.agreement import agree
from compress_core.session.controller import CompressionController
from compress_core.session.scheduler import CompressionScheduler

logger = logging.getLogger(__name__)

# Figures of NNCF's pruning -> those of the statistics here.
_FIGURES = {
    "full_flops": "full_flops",
    "current_flops": "current_flops",
    "full_params_num": "full_parameters",
    "current_params_num": "current_parameters",
}
# Attributes of NNCF's controllers that are not here -> what to use.
_INSTEAD = {
    "disable_scheduler": "freeze(); the accuracy-aware loop stops the schedule of the level that it moves",
    "get_state": "get_compression_state(); save_checkpoint() saves it with the weights",
    "current_groupwise_pruning_level": "statistics(), which has the level of each layer",
    "nodes_flops": "statistics(), which has the operations of the whole model",
    "run_batchnorm_adaptation": "adapt_batchnorm()",
    "compression_level": "compression_rate, or compression_stage()",
}
# The same for its schedulers.
_OF_SCHEDULES = {
    "target_level": "controller.target_level, or the config",
    "initial_level": "the config: sparsity_init, pruning_init",
    "target_epoch": "the config: sparsity_target_epoch",
    "freeze_epoch": "the config: sparsity_freeze_epoch",
    "num_warmup_epochs": "the config: num_init_steps",
    "num_pruning_epochs": "the config: pruning_steps",
}

_FORMAT = re.compile(r"^onnx(?:_(\d+))?$")
_LATEST = 21


class NNCFScheduler(CompressionScheduler):
    """The scheduler, with the levels that NNCF's have."""

    owner: CompressionController

    def __getattr__(self, name: str) -> Any:
        if name in _OF_SCHEDULES:
            raise UsageError(f"the scheduler has no '{name}' here; use {_OF_SCHEDULES[name]}")
        raise AttributeError(f"the scheduler has no '{name}'")

    def load_state(self, state: Mapping[str, Any], path: str = "scheduler") -> None:
        """Sets the clock; see `CompressionScheduler.load_state`. A state of NNCF is refused."""
        if isinstance(state, Mapping) and "current_epoch" in state:
            raise StateError(
                f"{path}: this state was saved by NNCF, which knows no steps within an epoch. Set the clock instead: "
                "scheduler.epoch_step(next_epoch)"
            )
        super().load_state(state, path)

    @property
    def current_sparsity_level(self) -> float:
        """The measured sparsity level; NNCF's is the one that the schedule asks for."""
        return float(self.owner.sparsity_level)

    @property
    def current_pruning_level(self) -> float:
        """The measured pruning level; NNCF's is the one that the schedule asks for."""
        return float(self.owner.pruning_level)


class ChildController:
    """One algorithm of a controller, with the names of NNCF; other attributes are those of the algorithm.

    Args:
        owner: The controller.
        algorithm: The algorithm.
    """

    def __init__(self, owner: CompressionController, algorithm: Algorithm) -> None:
        self._owner, self._algorithm = owner, algorithm
        self.name = algorithm.name
        self.scheduler = owner.scheduler

    def __getattr__(self, name: str) -> Any:
        if name in ("_owner", "_algorithm"):
            raise AttributeError(name)
        if name == "loss":
            raise UsageError(
                f"child_ctrls: the loss of '{self._algorithm.name}' alone is not offered; controller.loss() is the sum"
            )
        return getattr(self._algorithm, name)

    def compression_stage(self) -> CompressionStage:
        """Returns the progress of this algorithm; of one that has no part in the stage, that of the whole.

        So the sum over `child_ctrls` is `controller.compression_stage()`.
        """
        return self._owner.compression_stages().get(self.name, self._owner.compression_stage())

    def statistics(self, quickly_collected_only: bool = False) -> AlgorithmStatistics | None:
        """Returns the figures of this algorithm; the argument is ignored."""
        part = self._owner.statistics().parts.get(self.name)
        return None if part is None else AlgorithmStatistics(part)


class NNCFController(CompressionController):
    """The controller, with NNCF's methods."""

    def __getattr__(self, name: str) -> Any:
        if name in _FIGURES:
            return self._figure(name)
        if name in _INSTEAD:
            raise UsageError(f"the controller has no '{name}' here; use {_INSTEAD[name]}")
        return super().__getattr__(name)

    def statistics(self, quickly_collected_only: bool = False) -> NNCFStatistics:
        """Returns figures measured on the current model, under NNCF's names as well; the argument is ignored."""
        return NNCFStatistics(super().statistics().parts)

    def _figure(self, name: str) -> Any:
        for part in self.statistics().parts.values():
            if hasattr(part, _FIGURES[name]):
                return getattr(part, _FIGURES[name])
        raise UsageError(f"'{name}' is counted by algorithms that remove channels, and this config has none of them")

    @property
    def child_ctrls(self) -> list[ChildController]:
        """A view of each algorithm, in pipeline order."""
        return [ChildController(self, algorithm) for algorithm in self.algorithms.values()]

    @property
    def maximal_compression_rate(self) -> float:
        """The highest `compression_rate` that can be set, in its unit; of several algorithms the lowest."""
        found = [a.highest_level for a in self.algorithms.values() if isinstance(a, LevelAlgorithm)]
        return min(found, default=1.0)

    @property
    def pruned_module_groups_info(self) -> dict[int, list[str]]:
        """Number of each group of channels -> the layers that produce them."""
        found: dict[int, list[str]] = self.pruned_module_groups
        return found

    def distributed(self) -> None:
        """Makes sure that all processes have the same model; tensors are those of rank 0. Call it before DDP.

        Models that were created after the processes had been connected are equal already.

        Raises:
            RankError: Processes differ in their plans.
        """
        with together("distributed()"):
            agree(self.model, self._lifecycle)

    def prepare_for_export(self) -> None:
        """Does nothing, with a warning: `export_model`, `export` and `strip` prepare a copy themselves."""
        logger.warning(
            "prepare_for_export() does nothing here: export_model() and strip() prepare a copy. For an export of your "
            "own: torch.onnx.export(controller.strip(), ...)"
        )

    def export_model(
        self,
        save_path: str,
        save_format: str | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        model_args: Any = None,
    ) -> ExportReport:
        """Writes an ONNX file, after running it and comparing it with torch.

        Args:
            save_path: The file.
            save_format: `onnx`, or `onnx_<opset>` with an opset of at least 13; by default opset 21 (NNCF: 14).
            input_names: Names of the inputs.
            output_names: Names of the outputs.
            model_args: Refused: arguments beyond the tensors belong into `controller.export_onnx(path, args)`.

        Raises:
            UsageError: Another format is asked for, or `model_args` is given.
            ExportError: The model cannot be exported; no file is left.
        """
        found = _FORMAT.match(save_format or "onnx")
        if found is None:
            raise UsageError(
                f"save_format: '{save_format}' is not onnx or onnx_<opset>; other runtimes: controller.export(path, "
                "target=...)"
            )
        if model_args is not None:
            raise UsageError("model_args: pass all arguments of forward: controller.export_onnx(path, args)")
        opset = int(found[1]) if found[1] else _LATEST
        return self.export_onnx(save_path, opset=opset, input_names=input_names, output_names=output_names)

    def strip_model(self, model: Any, do_copy: bool = False) -> Any:
        """Returns the plain model; see `strip`."""
        return self.strip(do_copy=do_copy, model=None if model is self.model else model)


def with_nncf_methods(controller: CompressionController) -> NNCFController:
    """Returns the same controller, with NNCF's methods; it stays one for everything else."""
    # Only methods are added, so the class of the object can be replaced; its state is what it was.
    controller.__class__ = NNCFController
    scheduler = controller.scheduler
    scheduler.__class__ = NNCFScheduler
    assert isinstance(controller, NNCFController)
    assert isinstance(scheduler, NNCFScheduler)
    scheduler.owner = controller
    return controller
