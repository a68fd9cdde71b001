"""`Runner`: trains and measures epochs, keeps the best model, and saves what is needed to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from compress_core.accuracy_aware import learning_rate
from compress_core.accuracy_aware.functions import UserFunctions
from compress_core.accuracy_aware.learning_rate import as_list
from compress_core.accuracy_aware.records import EpochRecord
from compress_core.accuracy_aware.saved import Folder, Progress, best_name
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.stages import CompressionStage
from compress_core.data.progress import ProgressBar, progress_bar
from compress_core.data.ranks import is_first_rank, together
from compress_core.errors import PluginError, UsageError
from compress_core.files import replaced_file
from compress_core.session.checkpoints import Checkpoint
from compress_core.session.controller import CompressionController

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9  # of a measured rate


class Runner:
    """One run of a loop. `dump_checkpoint_fn` is given it, so some attributes have NNCF's names.

    Args:
        controller: The controller.
        model: The model that is trained: the controller's, or a wrapper of it.
        functions: What the user gave.
        progress: What the loop knows; it is changed.
        mover: The algorithm whose level moves; None in `early_exit`.
        minimal_accuracy: The lowest metric that is allowed.
        folder: Where files go.
        lr_updates_needed: Whether to step the schedulers of the learning rate.
        verbose: Whether to show a progress bar and to log each epoch.
        dumps: Whether to save the last state after each epoch, too.
        writer: A `SummaryWriter` of TensorBoard, or None.
    """

    def __init__(
        self,
        controller: CompressionController,
        model: nn.Module,
        functions: UserFunctions,
        progress: Progress,
        *,
        mover: Algorithm | None,
        minimal_accuracy: float,
        folder: Folder,
        lr_updates_needed: bool,
        verbose: bool,
        dumps: bool,
        writer: Any,
    ) -> None:
        self.controller, self.model, self.progress = controller, model, progress
        self.minimal_accuracy = minimal_accuracy
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self._functions, self._mover, self._folder = functions, mover, folder
        self._lr_updates_needed, self._verbose, self._dumps, self._writer = lr_updates_needed, verbose, dumps, writer
        self._bar: ProgressBar | None = None

    # NNCF's names, for `dump_checkpoint_fn`.

    @property
    def cumulative_epoch_count(self) -> int:
        """Epochs trained in all."""
        return self.progress.epochs

    @property
    def current_val_metric_value(self) -> float | None:
        """The last metric."""
        return self.progress.history[-1].metric if self.progress.history else None

    @property
    def best_val_metric_value(self) -> float | None:
        """The best metric since the optimizers were made."""
        return self.progress.best_metric

    # Epochs.

    @contextlib.contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Context manager with a progress bar over all epochs, which stays at the end."""
        if not self._verbose:
            yield
            return
        done = self.progress.epochs
        with progress_bar("accuracy-aware training", total, unit="epoch", done=done, leave=True) as self._bar:
            yield

    def make_optimizers(self, factor: float = 1.0) -> None:
        """Makes new optimizers, with their rates scaled, and forgets the best metric."""
        self.optimizer, self.lr_scheduler = self._functions.optimizers()
        schedulers = as_list(self.lr_scheduler)
        self.controller.check_optimizers(*as_list(self.optimizer))
        learning_rate.check_schedulers(
            schedulers,
            updates=self._lr_updates_needed,
            is_searching=self._mover is not None and self.progress.settings.get("lr_reduction_factor") != 1.0,
            own_update=self._functions.update_learning_rate is not None,
        )
        learning_rate.scale(as_list(self.optimizer), schedulers, factor)
        self.progress.epochs_since_reset, self.progress.best_metric = 0, None

    def train_epoch(self) -> EpochRecord:
        """Trains an epoch, measures, keeps the best model, and steps the learning rate."""
        progress = self.progress
        self._begin_epoch()
        lr = learning_rate.learning_rate(as_list(self.optimizer))
        loss = self._functions.train(self.controller, self.model, progress.epochs, self.optimizer, self.lr_scheduler)
        progress.epochs += 1
        progress.epochs_since_reset += 1
        record = self.validate(loss, lr)
        self._step_learning_rate(record)
        if self._bar is not None:
            self._bar.update()
            self._bar.note(rate=f"{record.rate:.3f}", metric=record.metric)
        return record

    def validate(self, loss: float | None = None, lr: float | None = None) -> EpochRecord:
        """Measures the metric and the rate, and keeps the model if it is the best candidate so far."""
        progress = self.progress
        record = self._measured(loss, lr)
        progress.history.append(record)
        given = {"loss": loss, "metric": record.metric}
        self.controller.log_epoch(**{name: value for name, value in given.items() if value is not None})
        if record.metric is not None:
            best = progress.best_metric
            progress.best_metric = record.metric if best is None else max(best, record.metric)
        user_file = self._dump_of_user()
        if record.is_candidate and self._is_best(record):
            progress.best = len(progress.history) - 1
            self._folder.save_best(progress.best)
            progress.best_of_user = self._copied(user_file)
        self._report(record)
        return record

    def metric(self) -> float | None:
        """Returns the metric of the model as it is now, without a record."""
        return self._functions.metric(self.model, self.progress.epochs)

    def stops(self, record: EpochRecord) -> bool:
        """Returns whether the user asks to stop after this epoch."""
        return self._functions.stops(record.metric)

    def set_rate(self, rate: float, factor: float) -> None:
        """Sets the level of the algorithm that moves, and begins a new training with its own optimizers."""
        mover = self._mover
        assert mover is not None
        logger.info("accuracy-aware training: the level of %s goes to %.4g", mover.name, rate)
        self.controller.context.transaction.run(
            lambda: setattr(mover, "compression_rate", rate), call=f"{mover.name}.compression_rate = {rate!r}"
        )
        self.make_optimizers(factor)

    def load_best(self) -> None:
        """Restores the best candidate, unless the model is at it."""
        best = self.progress.best
        assert best is not None
        self._folder.load_best(best)
        if self._functions.load_checkpoint is not None and self.progress.best_of_user is not None:
            self._functions.load_checkpoint(self.model, str(self._folder.path / self.progress.best_of_user))

    def save(self) -> None:
        """Saves everything that is needed to go on after this epoch."""
        if self._dumps:
            self._folder.save_last(self.progress, self.optimizer, self.lr_scheduler)
        elif is_first_rank():
            self._folder.remove_others(self.progress.best)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores what `save` has saved."""
        progress = self.progress
        since, best = progress.epochs_since_reset, progress.best_metric
        self.make_optimizers()
        progress.epochs_since_reset, progress.best_metric = since, best
        self._folder.restore(checkpoint, self.optimizer, self.lr_scheduler)

    # Implementation.

    def rate(self) -> float:
        """Returns the measured rate: of the algorithm that moves, or of all."""
        found = self.controller.compression_rate if self._mover is None else self._mover.compression_rate
        assert found is not None, "an algorithm whose rate can be set measures it"
        return float(found)

    def others_are_complete(self) -> bool:
        """Returns whether all algorithms but the one that moves are fully compressed."""
        stages = self.controller.compression_stages()
        name = None if self._mover is None else self._mover.name
        return all(stage == CompressionStage.FULLY_COMPRESSED for other, stage in stages.items() if other != name)

    def unfinished(self) -> list[str]:
        """Returns the names of the algorithms that are not fully compressed."""
        stages = self.controller.compression_stages()
        return [name for name, stage in stages.items() if stage != CompressionStage.FULLY_COMPRESSED]

    def _measured(self, loss: float | None, lr: float | None) -> EpochRecord:
        progress = self.progress
        metric = self.metric()
        budget = None if metric is None else metric - self.minimal_accuracy
        stage, searching = self.controller.compression_stage(), progress.phase == "search"
        holds = budget is not None and budget >= 0
        complete = self.others_are_complete() if searching else not self.unfinished()
        return EpochRecord(
            epoch=progress.epochs,
            phase=progress.phase,
            target_rate=progress.search.rate if progress.search is not None else None,
            rate=self.rate(),
            stage=stage.name,
            metric=metric,
            budget=budget,
            loss=loss,
            learning_rate=lr,
            is_candidate=complete and (holds if searching else metric is not None),
        )

    def _is_best(self, record: EpochRecord) -> bool:
        best = self.progress.best
        return best is None or record.order() > self.progress.history[best].order()

    def _begin_epoch(self) -> None:
        """Begins the controller's next epoch, in which the schedule must not move a level that was set."""
        before = self.rate()
        self.controller.scheduler.epoch_step()
        mover = self._mover
        if self.progress.phase == "search" and mover is not None and abs(self.rate() - before) > _ROUNDING:
            raise PluginError(
                f"'{mover.name}': its rate was {before:.6g} and is {self.rate():.6g} after epoch_step(); a "
                "compression_rate that was set has to hold, so its schedule has to stop (LevelAlgorithm.frozen)"
            )

    def _step_learning_rate(self, record: EpochRecord) -> None:
        if not self._lr_updates_needed or self.lr_scheduler is None:
            return
        progress = self.progress
        if self._functions.update_learning_rate is not None:
            self._functions.update_learning_rate(
                self.lr_scheduler, progress.epochs_since_reset, record.metric, record.loss
            )
        else:
            learning_rate.step(as_list(self.lr_scheduler), progress.best_metric)

    def _dump_of_user(self) -> str | None:
        dump: Callable[..., Any] | None = self._functions.dump_checkpoint
        if dump is None or not (self._dumps or self.progress.history[-1].is_candidate):
            return None
        with together("accuracy-aware training: dump_checkpoint_fn"):
            written = dump(self.model, self.controller, self, str(self._folder.path))
        if not isinstance(written, (str, os.PathLike)):
            raise UsageError(f"dump_checkpoint_fn: must return the path of the file that it wrote, got {written!r}")
        return os.fspath(written)

    def _copied(self, written: str | None) -> str | None:
        """Copies the user's file, which he may write again in the next epoch."""
        if written is None:
            return None
        source = Path(written)
        name = f"{best_name(len(self.progress.history) - 1)}_of_user{source.suffix}"
        with together("accuracy-aware training: copying the user's checkpoint"):
            if is_first_rank():
                try:
                    with source.open("rb") as file, replaced_file(self._folder.path / name) as copy:
                        shutil.copyfileobj(file, copy)
                except FileNotFoundError as error:
                    raise UsageError(f"dump_checkpoint_fn: returned '{written}', which is no file") from error
        return name

    def _report(self, record: EpochRecord) -> None:
        if self._verbose and is_first_rank():
            logger.info(
                "accuracy-aware training, epoch %d (%s): rate %.4g, metric %s, budget %s",
                record.epoch,
                record.phase,
                record.rate,
                record.metric,
                record.budget,
            )
        if self._writer is None or not is_first_rank():
            return
        figures = {"rate": record.rate, "metric": record.metric, "budget": record.budget, "lr": record.learning_rate}
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(f"accuracy_aware/{name}", value, record.epoch)
