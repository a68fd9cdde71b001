"""What the two loops of accuracy-aware training have in common."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from compress_core.accuracy_aware.functions import UserFunctions, number_in
from compress_core.accuracy_aware.picture import draw_accuracy_aware
from compress_core.accuracy_aware.records import AccuracyAwareStatistics
from compress_core.accuracy_aware.runner import Runner
from compress_core.accuracy_aware.saved import Folder, Progress, check_same_settings, read_progress
from compress_core.config import CompressionConfig
from compress_core.config.accuracy_aware import PATH, AccuracyAwareTraining
from compress_core.contract.algorithm import Algorithm
from compress_core.data.ranks import is_first_rank
from compress_core.errors import ConfigError, UsageError
from compress_core.files import replaced_file
from compress_core.pictures import has_matplotlib
from compress_core.session.checkpoints import Checkpoint
from compress_core.session.controller import CompressionController

logger = logging.getLogger(__name__)

Config = CompressionConfig | Mapping[str, Any] | str | Path

_DEFAULT_RELATIVE = 1.0  # percent


class AccuracyAwareTrainingLoop:
    """Base class of the two loops.

    Args:
        config: The config that the controller was created with.
        controller: The controller.
        uncompressed_model_accuracy: Metric of the uncompressed model, by the same function as `validate_fn`.
        lr_updates_needed: Whether the loop steps the scheduler of the learning rate after each epoch.
        verbose: Whether to show a progress bar and to log each epoch.
        dump_checkpoints: Whether to save the state after each epoch, too, without which a run cannot be resumed.

    Raises:
        ConfigError: The config has no section `accuracy_aware_training`, or one of the other mode.
        UsageError: The accuracy is no number, or controller and config do not belong together.
    """

    mode: ClassVar[str]

    def __init__(
        self,
        config: Config,
        controller: CompressionController,
        uncompressed_model_accuracy: float,
        lr_updates_needed: bool = True,
        verbose: bool = True,
        dump_checkpoints: bool = True,
    ) -> None:
        self._section = _section_of(config, controller, self.mode)
        self._controller = controller
        accuracy = number_in(uncompressed_model_accuracy)
        if accuracy is None or not math.isfinite(accuracy):
            raise UsageError(
                f"uncompressed_model_accuracy: must be a finite number, got {uncompressed_model_accuracy!r}"
            )
        self._uncompressed = accuracy
        self._options = {"lr_updates_needed": lr_updates_needed, "verbose": verbose, "dumps": dump_checkpoints}
        self._statistics: AccuracyAwareStatistics | None = None
        self.log_dir: Path | None = None

    @property
    def statistics(self) -> AccuracyAwareStatistics:
        """The result, and the epochs that led there.

        Raises:
            UsageError: `run` has not ended yet.
        """
        if self._statistics is None:
            raise UsageError("there are no statistics before run() has ended")
        return self._statistics

    @property
    def minimal_accuracy(self) -> float:
        """The lowest metric that is allowed.

        A relative degradation is a part of the metric's size, so that the bound lies below a negative metric, too.
        """
        return _lowest(self._section, self._uncompressed)

    def run(
        self,
        model: nn.Module,
        train_epoch_fn: Callable[..., Any],
        validate_fn: Callable[..., Any],
        configure_optimizers_fn: Callable[[], Any] | None = None,
        dump_checkpoint_fn: Callable[..., Any] | None = None,
        load_checkpoint_fn: Callable[..., Any] | None = None,
        early_stopping_fn: Callable[..., Any] | None = None,
        tensorboard_writer: Any = None,
        log_dir: str | os.PathLike[str] | None = None,
        update_learning_rate_fn: Callable[..., Any] | None = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> nn.Module:
        """Trains, and returns the model at the best state that was found.

        Args:
            model: The compressed model, or a wrapper of it (DDP, compiled).
            train_epoch_fn: `(controller, model, epoch=, optimizer=, lr_scheduler=)`: trains one epoch, and may return
                the loss. It calls `controller.scheduler.step()` before each optimizer step, and not `epoch_step()`.
            validate_fn: `(model, epoch=)`: returns the metric, a number of which more is better. Gradients are off.
            configure_optimizers_fn: `()`: returns (optimizer, lr_scheduler or None); either may be a list. Required.
            dump_checkpoint_fn: `(model, controller, runner, folder)`: writes a file of yours, and returns its path. The
                one of the best epoch is copied. The loop keeps its own checkpoints besides.
            load_checkpoint_fn: `(model, path)`: called with that copy after the loop has restored the best model.
            early_stopping_fn: `(metric)`: returns whether to leave the present level, or in `early_exit` to stop; asked
                when everything that has to be is compressed.
            tensorboard_writer: A `SummaryWriter`, or anything with `add_scalar(name, value, epoch)`.
            log_dir: Files go to `<log_dir>/accuracy_aware_training/<date and time>`; by default `runs`.
            update_learning_rate_fn: `(lr_scheduler, epoch, metric, loss)`: called in place of `lr_scheduler.step()`.
            resume_from: A folder of an earlier run, or its `last.pt`: goes on in it with the same bits.

        Returns:
            The model that was given.

        Raises:
            UsageError: A function is missing, or returns what it should not.
            StateError: `resume_from` is damaged, or of another model, config or other numbers.
            FileError: A file cannot be written.
        """
        functions = UserFunctions(
            train_epoch_fn,
            validate_fn,
            configure_optimizers_fn,  # type: ignore[arg-type]
            early_stopping_fn,
            update_learning_rate_fn,
            dump_checkpoint_fn,
            load_checkpoint_fn,
        )
        functions.check()
        self._check_model(model)
        if tensorboard_writer is not None and not callable(getattr(tensorboard_writer, "add_scalar", None)):
            raise UsageError(f"tensorboard_writer: has no add_scalar(name, value, epoch), got {tensorboard_writer!r}")
        progress, checkpoint, folder = self._begin(log_dir, resume_from)
        runner = Runner(
            self._controller,
            model,
            functions,
            progress,
            mover=self._mover(),
            minimal_accuracy=_lowest(self._section, progress.uncompressed_accuracy),
            folder=folder,
            writer=tensorboard_writer,
            **self._options,
        )
        self.log_dir = folder.path
        if checkpoint is None:
            runner.make_optimizers()
            runner.validate()
            runner.save()
        else:
            runner.restore(checkpoint)
        with runner.shown(self._section.params.maximal_total_epochs):
            self._run(runner)
        self._report(runner, folder.path)
        return model

    # What the two modes do differently.

    def _run(self, runner: Runner) -> None:
        raise NotImplementedError

    def _mover(self) -> Algorithm | None:
        return None

    def _settings(self) -> dict[str, Any]:
        return {}

    # What they have in common.

    def _train_until_it_holds(self, runner: Runner, most_epochs: int) -> None:
        """Trains at the config's own schedule until everything is compressed and the accuracy holds."""
        progress = runner.progress
        while not (progress.is_stopped or self._holds(runner) or progress.epochs >= most_epochs):
            record = runner.train_epoch()
            progress.is_stopped = record.is_candidate and runner.stops(record)
            runner.save()

    def _holds(self, runner: Runner) -> bool:
        last = runner.progress.history[-1]
        return last.is_candidate and last.budget is not None and last.budget >= 0

    def _go_to_best(self, runner: Runner) -> bool:
        """Loads the best candidate unless the model is at it; returns whether there is one."""
        progress = runner.progress
        if progress.best is None:
            return False
        if progress.best != len(progress.history) - 1:
            runner.load_best()
        return True

    def _check_model(self, model: nn.Module) -> None:
        mine = self._controller.model
        if not isinstance(model, nn.Module) or not any(module is mine for module in model.modules()):
            raise UsageError(
                f"model: this {type(model).__name__} is not the model of the controller, nor a wrapper of it; pass "
                "what create_compressed_model returned"
            )

    def _begin(
        self, log_dir: str | os.PathLike[str] | None, resume_from: str | os.PathLike[str] | None
    ) -> tuple[Progress, Checkpoint | None, Folder]:
        params = self._section.params
        settings = {
            "maximal_relative_accuracy_degradation": params.maximal_relative_accuracy_degradation,
            "maximal_absolute_accuracy_degradation": params.maximal_absolute_accuracy_degradation,
            **self._settings(),
        }
        fresh = Progress(mode=self._section.mode, settings=settings, uncompressed_accuracy=self._uncompressed)
        if resume_from is None:
            return fresh, None, Folder.new(log_dir, self._controller)
        checkpoint, progress = read_progress(resume_from)
        check_same_settings(progress, fresh, checkpoint.path)
        if progress.uncompressed_accuracy != self._uncompressed:
            logger.warning(
                "uncompressed_model_accuracy: is %r, and was %r when the run began, which holds",
                self._uncompressed,
                progress.uncompressed_accuracy,
            )
        return progress, checkpoint, Folder(Path(checkpoint.path).parent, self._controller)

    def _report(self, runner: Runner, folder: Path) -> None:
        """Measures the model that is returned, and writes table and picture."""
        progress = runner.progress
        result = len(progress.history) - 1 if progress.best is None else progress.best
        metric = progress.history[result].metric if result == len(progress.history) - 1 else runner.metric()
        self._statistics = AccuracyAwareStatistics(
            progress.uncompressed_accuracy,
            runner.rate(),
            metric,
            runner.minimal_accuracy,
            tuple(progress.history),
            result,
        )
        if not is_first_rank():
            return
        for name, text in (
            ("statistics.json", json.dumps(self._statistics.to_dict(), indent=2)),
            ("statistics.txt", self._statistics.to_str()),
        ):
            with replaced_file(folder / name) as file:
                file.write(f"{text}\n".encode())
        if has_matplotlib():
            draw_accuracy_aware(self._statistics, folder / "rate_and_accuracy.png")
        if self._options["verbose"]:
            logger.info("%s", self._statistics.tables()[0].to_str())


def _section_of(config: Config, controller: CompressionController, mode: str) -> AccuracyAwareTraining:
    if not isinstance(controller, CompressionController):
        raise UsageError(f"controller: got a {type(controller).__name__}; create_compressed_model returns it first")
    loaded = CompressionConfig.load(config)
    section = loaded.root.accuracy_aware_training
    if section is None:
        raise ConfigError('is missing; it says how much accuracy may be lost: {"mode": "early_exit"}', path=PATH)
    if section.mode != mode:
        raise ConfigError(f"is '{section.mode}', and this loop is of mode '{mode}'", path=f"{PATH}.mode")
    names = {part.algorithm for part in loaded.sections}
    if names != set(controller.algorithms):
        raise UsageError(
            f"config: it has the algorithms {sorted(names)}, and the controller has {sorted(controller.algorithms)}; "
            "pass the config that the model was created with"
        )
    return section


def _lowest(section: AccuracyAwareTraining, uncompressed: float) -> float:
    params = section.params
    if params.maximal_absolute_accuracy_degradation is not None:
        return uncompressed - params.maximal_absolute_accuracy_degradation
    relative = params.maximal_relative_accuracy_degradation
    percent = _DEFAULT_RELATIVE if relative is None else relative
    return uncompressed - abs(uncompressed) * percent / 100
