"""The two loops, with NNCF's names: `early_exit` and `adaptive_compression_level`."""

from __future__ import annotations

import logging
from typing import Any

from compress_core.accuracy_aware.base import AccuracyAwareTrainingLoop, Config
from compress_core.accuracy_aware.levels import moving_algorithm
from compress_core.accuracy_aware.runner import Runner
from compress_core.accuracy_aware.search import RateSearch, SearchRules, SearchState
from compress_core.config import CompressionConfig
from compress_core.config.accuracy_aware import ADAPTIVE, OF_THE_SEARCH
from compress_core.contract.algorithm import Algorithm
from compress_core.contract.levels import LevelAlgorithm
from compress_core.errors import UsageError
from compress_core.session.controller import CompressionController

logger = logging.getLogger(__name__)


class EarlyExitCompressionTrainingLoop(AccuracyAwareTrainingLoop):
    """Trains until the model is fully compressed and its accuracy holds, or for the most epochs that are allowed.

    The model that is returned is the one with the best metric among those that were fully compressed.
    """

    mode = "early_exit"

    def _run(self, runner: Runner) -> None:
        self._train_until_it_holds(runner, self._section.params.maximal_total_epochs)
        if not self._go_to_best(runner):
            logger.warning(
                "accuracy-aware training: after %d epochs the model is not fully compressed (%s), so it is returned as "
                "it is after the last one; raise maximal_total_epochs, or let the schedules end earlier",
                runner.progress.epochs,
                ", ".join(runner.unfinished()) or "or its metric was never a number",
            )


class AdaptiveCompressionTrainingLoop(AccuracyAwareTrainingLoop):
    """Searches the highest level of one algorithm at which the accuracy holds.

    First it trains as `early_exit` does, at the config's own schedule. Then it moves the level
    (`compress_core.accuracy_aware.search`); the other algorithms follow their schedules. The model that is returned is
    the one with the highest measured level among those whose accuracy held.

    Args:
        config: As of `EarlyExitCompressionTrainingLoop`; so are the next arguments.
        controller: The controller.
        uncompressed_model_accuracy: Metric of the uncompressed model.
        lr_updates_needed: Whether the loop steps the scheduler of the learning rate.
        verbose: Whether to show a progress bar and to log each epoch.
        dump_checkpoints: Whether to save the state after each epoch, too.
        minimal_compression_rate: Lowest level of the search.
        maximal_compression_rate: Highest level of the search, below 1.
    """

    mode = ADAPTIVE

    def __init__(
        self,
        config: Config,
        controller: CompressionController,
        uncompressed_model_accuracy: float,
        lr_updates_needed: bool = True,
        verbose: bool = True,
        dump_checkpoints: bool = True,
        minimal_compression_rate: float = 0.0,
        maximal_compression_rate: float = 0.95,
    ) -> None:
        super().__init__(config, controller, uncompressed_model_accuracy, lr_updates_needed, verbose, dump_checkpoints)
        self._moving = moving_algorithm(self._section, list(controller.algorithms.values()))
        self._bounds = (minimal_compression_rate, maximal_compression_rate)
        if not 0 <= minimal_compression_rate < maximal_compression_rate < 1:
            raise UsageError(
                "minimal_compression_rate and maximal_compression_rate: must be two rising numbers in [0, 1), got "
                f"{minimal_compression_rate!r} and {maximal_compression_rate!r}"
            )

    def _mover(self) -> Algorithm | None:
        return self._moving

    def _settings(self) -> dict[str, Any]:
        params = self._section.params
        values = {name: getattr(params, name) for name in OF_THE_SEARCH}
        lowest, highest = self._bounds
        bounds = {"minimal_compression_rate": float(lowest), "maximal_compression_rate": float(highest)}
        return {**values, **bounds, "algorithm": self._moving.name}

    def _run(self, runner: Runner) -> None:
        progress, most = runner.progress, self._section.params.maximal_total_epochs
        if progress.search is None:
            self._train_until_it_holds(runner, min(self._section.params.initial_training_phase_epochs, most))
            self._wait_for_others(runner, most)
            self._begin_search(runner)
        assert progress.search is not None
        search = RateSearch(self._rules(), progress.search)
        while progress.epochs < most and not search.end:
            self._train_where_the_search_goes(runner, search)
        self._end_search(runner, search)

    def _wait_for_others(self, runner: Runner, most: int) -> None:
        """Trains on while other algorithms are not complete: their accuracy would say nothing about a level."""
        if not runner.others_are_complete() and runner.progress.epochs < most:
            names = [name for name in runner.unfinished() if name != self._moving.name]
            logger.info(
                "accuracy-aware training: the initial phase goes on until %s is fully compressed", " and ".join(names)
            )
        while not runner.others_are_complete() and runner.progress.epochs < most:
            runner.train_epoch()
            runner.save()

    def _begin_search(self, runner: Runner) -> None:
        progress = runner.progress
        self._go_to_best(runner)
        progress.best = progress.best_of_user = None
        progress.phase = "search"
        first = self._section.params.initial_compression_rate_step
        progress.search = SearchState(rate=runner.rate(), step=first)
        lowest, highest = self._bounds
        if not lowest <= progress.search.rate <= highest:
            logger.warning(
                "accuracy-aware training: the search begins at the level %.4g, outside of minimal_compression_rate "
                "%.4g and maximal_compression_rate %.4g, which bound the levels that it sets; the model may be "
                "returned with the level that it began with. Start %s within them",
                progress.search.rate,
                lowest,
                highest,
                self._moving.name,
            )
        progress.search.best = runner.validate().budget

    def _train_where_the_search_goes(self, runner: Runner, search: RateSearch) -> None:
        progress = runner.progress
        rate = search.move()
        if search.end:
            return
        if rate is not None:
            if not self._go_to_best(runner):
                logger.warning(
                    "accuracy-aware training: the accuracy has not held at any level yet; the search goes on with the "
                    "present weights"
                )
            progress.search = search.state
            runner.set_rate(rate, search.state.lr)
        record = runner.train_epoch()
        search.observe(record.budget, stopped=runner.stops(record))
        progress.search = search.state
        runner.save()

    def _end_search(self, runner: Runner, search: RateSearch) -> None:
        if search.end == "lowest":
            logger.warning("accuracy-aware training: the accuracy does not hold at the lowest level that is allowed")
        if self._go_to_best(runner):
            return
        if not runner.others_are_complete():
            logger.warning(
                "accuracy-aware training: after %d epochs %s, so no level was tried; the model is returned as it is. "
                "Raise maximal_total_epochs, or let the other schedules end earlier",
                runner.progress.epochs,
                f"{' and '.join(n for n in runner.unfinished() if n != self._moving.name)} is not fully compressed",
            )
        else:
            logger.warning(
                "accuracy-aware training: the accuracy has not held at any level, so the model is returned as it is "
                "after the last epoch; allow a larger degradation, or train for longer (patience_epochs)"
            )

    def _rules(self) -> SearchRules:
        lowest, highest = self._bounds
        if isinstance(self._moving, LevelAlgorithm):
            highest = min(highest, self._moving.highest_level)
        return SearchRules.of(self._section.params, float(lowest), float(highest))


def create_accuracy_aware_training_loop(
    config: Config,
    controller: CompressionController,
    uncompressed_model_accuracy: float,
    **arguments: Any,
) -> AccuracyAwareTrainingLoop:
    """Returns the loop of the mode that the config names; `run` trains.

    Args:
        config: The config that the controller was created with; it has a section `accuracy_aware_training`.
        controller: The controller.
        uncompressed_model_accuracy: Metric of the uncompressed model, by the same function as `validate_fn` of `run`.
        arguments: `lr_updates_needed`, `verbose` and `dump_checkpoints`, and in `adaptive_compression_level`
            `minimal_compression_rate` and `maximal_compression_rate`.

    Raises:
        ConfigError: There is no such section, or it is not clear which level moves.
        UsageError: The accuracy is no number, an argument is unknown, or controller and config do not belong together.
    """
    loaded = CompressionConfig.load(config)
    section = loaded.root.accuracy_aware_training
    kind: type[AccuracyAwareTrainingLoop] = EarlyExitCompressionTrainingLoop
    known = ["lr_updates_needed", "verbose", "dump_checkpoints"]
    if section is not None and section.mode == ADAPTIVE:
        kind = AdaptiveCompressionTrainingLoop
        known += ["minimal_compression_rate", "maximal_compression_rate"]
    if unknown := [name for name in arguments if name not in known]:
        mode = kind.mode
        raise UsageError(f"{unknown[0]}: is no argument of mode '{mode}', which takes {', '.join(known)}")
    return kind(loaded, controller, uncompressed_model_accuracy, **arguments)
