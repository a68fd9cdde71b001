"""Compression in training loops that Hugging Face accelerate prepares."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress_core.errors import UsageError
from compress_core.integrations.progress import Progress
from compress_core.integrations.saved_run import SavedRun, read_run, write_run
from compress_core.session.controller import CompressionController

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        f"compress_core.integrations.accelerate needs accelerate ({error}): pip install 'compress-core[accelerate]'"
    ) from error

# What trains with the whole weights in each process.
_WHOLE = (DistributedType.NO, *(kind for kind in DistributedType if kind.name.startswith("MULTI_")))


class CompressionCallback:
    """Drives a controller in a training loop with an `Accelerator`.

    The loop calls `epoch_step` and `step`, which counts optimizer steps, not micro-batches. `accelerator.save_state`
    saves the compression state with the rest, and `accelerator.load_state` restores it.

    Example:
        >>> controller, model = create_compressed_model(model, config)
        >>> compression = CompressionCallback(controller, accelerator)
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> for epoch in range(epochs):
        ...     compression.epoch_step(epoch)
        ...     for inputs, labels in loader:
        ...         with accelerator.accumulate(model):
        ...             compression.step()
        ...             loss = criterion(model(inputs), labels) + controller.loss()
        ...             accelerator.backward(loss)
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        ...     accelerator.save_state("run")
        >>> compression.end()

    Args:
        controller: The controller of the model that is prepared.
        accelerator: The accelerator.
        log_statistics: Whether to log the statistics at the beginning of each epoch and at the end, if the accelerator
            has trackers.

    Raises:
        UsageError: `controller` is no controller, or the accelerator shards weights.
    """

    def __init__(
        self, controller: CompressionController, accelerator: Accelerator, *, log_statistics: bool = True
    ) -> None:
        self._progress = Progress(controller)
        if accelerator.distributed_type not in _WHOLE:
            raise UsageError(
                f"accelerate: with {accelerator.distributed_type.value}, processes have parts of weights; use several "
                "processes with whole weights (MULTI_GPU, MULTI_CPU)"
            )
        self.accelerator = accelerator
        self._log_statistics = log_statistics
        self._loaded: SavedRun | None = None
        self._is_first_of_step = True
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._check)

    @property
    def controller(self) -> CompressionController:
        """The controller."""
        return self._progress.controller

    def epoch_step(self, epoch: int) -> None:
        """Begins an epoch, unless it had begun when the state was saved that has been loaded.

        Args:
            epoch: Index of the loop's epoch, from 0 on; for a resumed loop, that of the epoch in which it goes on.

        Raises:
            UsageError: It is not the epoch that comes next.
        """
        self._finish_loading()
        self._progress.begin_epoch(epoch)
        self._is_first_of_step = True
        self._log()

    def step(self) -> None:
        """Begins an optimizer step at its first micro-batch; call it within `accelerator.accumulate`, if you use it."""
        self._finish_loading()
        if self._is_first_of_step:
            self.controller.scheduler.step()
        self._is_first_of_step = self.accelerator.sync_gradients

    def end(self) -> None:
        """Logs the statistics, and warns if the model is not compressed as far as was asked for.

        Call it after the last epoch.
        """
        self._log()
        self.controller.log_epoch()
        self._progress.warn_if_unfinished("at the end of the training")

    def _log(self) -> None:
        if self._log_statistics and self.accelerator.trackers:
            self.accelerator.log(self._progress.figures(), step=self.controller.scheduler.current_step + 1)

    def _save(self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        self._find(models)
        self._finish_loading()
        if self.accelerator.is_main_process:
            write_run(output_dir, self._progress.saved())

    def _check(self, models: list[nn.Module], input_dir: str) -> None:
        """Refuses a state that does not fit before anything of it is loaded."""
        self._find(models)
        run = read_run(input_dir)
        run.check(self.controller)
        self._loaded = run

    def _finish_loading(self) -> None:
        # accelerate has no hook for when the weights have been loaded.
        if self._loaded is not None:
            run, self._loaded = self._loaded, None
            self._progress.resume(run)

    def _find(self, models: list[nn.Module]) -> None:
        if not any(self.accelerator.unwrap_model(model) is self.controller.model for model in models):
            kinds = [type(model).__name__ for model in models]
            raise UsageError(
                f"accelerate: none of the prepared models ({kinds}) is the controller's; prepare the model that "
                "create_compressed_model returned"
            )
