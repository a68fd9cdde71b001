"""What is recorded and logged of a training, epoch by epoch. Methods of the controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_core.contract.statistics import CompressionStatistics
from compress_core.session.history import EpochFigures, Number, figures_at
from compress_core.session.parts import ControllerParts


class RecordingMethods(ControllerParts):
    """The methods of `CompressionController` that record the figures of each epoch, and log them."""

    @property
    def history(self) -> tuple[EpochFigures, ...]:
        """The figures of the model before the first epoch and after each one; the last row is measured now.

        `scheduler.epoch_step()` records a row before the algorithms go on, so each row is what its epoch has trained,
        with the level of that epoch. The history is part of the compression state. A training that goes back to an
        earlier epoch writes it anew from there.
        """
        return self._history.until(self._figures())

    def log_epoch(self, **values: Any) -> EpochFigures:
        """Adds to history and logs what only the training loop knows about the epoch that it has just trained.

        The last epoch, after which no other one begins, is logged by this call alone.

        Args:
            values: Numbers by name, such as `loss=0.31, accuracy=0.92`; a later call for the same epoch adds to them.

        Returns:
            The row of the history: what was given, and what was measured on the model now.

        Raises:
            UsageError: A value is no number, or has the name of what is measured.
        """
        row = self._history.until(self._figures(values))[-1]
        self._logbook.at_epoch(row)
        return self._history.record(row)

    def log_to(self, writer: Any, *, every_steps: int | None = None) -> None:
        """Logs the figures of the history to a writer, too, from now on; there may be several.

        They are measured and written where an epoch begins, before the algorithms go on, as `history` says: what is
        written at epoch 3 is what three epochs have trained. `log_epoch()` writes an epoch once it has ended. Of
        several processes the first one writes. Neither copies of the controller nor its saved state have the writers:
        call this again after a training was resumed.

        Args:
            writer: The path of a CSV file (`.csv`), with a line for each moment; a resumed training goes on in it, and
                replaces what the interrupted one has written after its checkpoint. Or a `SummaryWriter` of TensorBoard,
                or anything else with `add_scalar(name, value, step)`. Or a function that is called with a dict of
                values and the step, such as `mlflow.log_metrics` or `wandb_run.log`. In the last two cases measured
                figures are named as the callbacks for training libraries name them: `compression/quantization/...`.
            every_steps: Writes also where an optimizer step begins that follows so many; then `step` counts optimizer
                steps. By default it counts epochs. Each time reads figures from the device, which waits for it.

        Raises:
            UsageError: It is something else; or a CSV file has figures already, and this training is at its beginning.
            FileError: The file cannot be read, or its folder does not exist.
        """
        self._logbook.add(writer, every_steps, self.scheduler.clock)

    def _figures(self, given: Mapping[str, Any] | None = None) -> EpochFigures:
        # What initializers report is of a pass in the past, with its wall time; it would be the same in each row.
        statistics = CompressionStatistics(self._inspected.statistics(self.model))
        measured: dict[str, Number] = {"compression_rate": self._rate(), **statistics.scalars()}
        return figures_at(self.scheduler.clock, measured, given)
