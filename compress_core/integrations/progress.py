"""Keeps the controller's clock beside the loop of a training library."""

from __future__ import annotations

import logging

from compress_core.contract.stages import CompressionStage
from compress_core.data.ranks import is_first_rank
from compress_core.errors import UsageError
from compress_core.integrations.saved_run import SavedRun, check_controller
from compress_core.session.controller import CompressionController
from compress_core.session.log_writers import PREFIX

logger = logging.getLogger(__name__)


class Progress:
    """The epochs of a library's loop, as those of a controller.

    Libraries count epochs from 0 for each trainer, and some of them begin the current epoch again when they resume in
    the middle of it. The controller counts on over all trainings, and each of its epochs begins once.

    Args:
        controller: The controller.
    """

    def __init__(self, controller: CompressionController) -> None:
        check_controller(controller)
        self.controller = controller
        self.start()

    def start(self) -> None:
        """Begins a training: its epoch 0 is the controller's next one."""
        self.epochs_before = self.controller.scheduler.current_epoch + 1

    def saved(self) -> SavedRun:
        """Returns what has to be saved with the weights."""
        return SavedRun(self.controller.get_compression_state(), self.epochs_before, "")

    def resume(self, run: SavedRun) -> None:
        """Brings the controller to where it was when a checkpoint was saved, whose weights the library has loaded.

        Raises:
            StateError: The model is not the one that was saved.
        """
        weights = {name: value.clone() for name, value in self.controller.model.state_dict().items()}
        self.controller.load_state(run.compression_state, weights)
        self.epochs_before = run.epochs_before

    def begin_epoch(self, epoch: int) -> None:
        """Begins an epoch, unless it has begun before the training was resumed.

        Args:
            epoch: Index of the library's epoch.

        Raises:
            UsageError: The library begins another epoch than the one that comes next.
        """
        scheduler = self.controller.scheduler
        wanted = self.epochs_before + epoch
        if wanted == scheduler.current_epoch:
            return
        if wanted != scheduler.current_epoch + 1:
            raise UsageError(
                f"the training begins its epoch {epoch}, for the controller epoch {wanted}, but the controller is at "
                f"epoch {scheduler.current_epoch}: it was driven besides, or the training resumes from a checkpoint "
                "of another run"
            )
        scheduler.epoch_step()

    def figures(self) -> dict[str, float]:
        """Returns levels and shares of the algorithms: `compression/magnitude_sparsity/sparsity_level`, ..."""
        measured = self.controller.history[-1].measured
        return {f"{PREFIX}{name}": value for name, value in measured.items() if isinstance(value, float)}

    def warn_if_unfinished(self, when: str) -> None:
        """Warns if the model is compressed less than the config asks for."""
        if not is_first_rank():
            return  # once is enough
        stage = self.controller.compression_stage()
        if stage != CompressionStage.FULLY_COMPRESSED:
            epoch = self.controller.scheduler.current_epoch
            logger.warning(
                "%s, the model is %s (the controller is in epoch %d): its schedule has not ended; train for more "
                "epochs, or let the schedule end earlier",
                when,
                stage.name,
                epoch,
            )
