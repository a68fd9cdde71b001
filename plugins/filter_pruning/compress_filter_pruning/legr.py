"""`learned_ranking`: coefficients whose pruned model trains best in a few steps (LeGR, Chin et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compress_core import DataError, LeGRInitArgs
from compress_filter_pruning.config import FilterPruningConfig, LegrParams
from compress_filter_pruning.evolution import Evolution, Space
from compress_filter_pruning.functions import same_chances, validated
from compress_filter_pruning.ranking import RankingRequest
from compress_filter_pruning.statistics import Coefficients, Ranking


class _Scheduler:
    """The scheduler that `train_steps_fn` may call; the level of a candidate does not change."""

    def step(self, next_step: int | None = None) -> None:
        """Does nothing."""

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Does nothing."""


class TrialController:
    """What `train_steps_fn` gets as the controller of a candidate.

    Attributes:
        scheduler: Its methods do nothing.
    """

    def __init__(self) -> None:
        self.scheduler = _Scheduler()

    def loss(self) -> torch.Tensor:
        """Returns 0: pruning adds nothing to the loss."""
        return torch.zeros(())


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer that NNCF uses."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=5e-4, nesterov=True)


class LearnedRanking:
    """Coefficients whose pruned model has the lowest loss after a few steps of training."""

    def search(self, request: RankingRequest) -> Ranking:
        """Trains one copy of the model for each candidate; the model itself is not touched.

        Raises:
            DataError: Functions are missing, or return something else than they should.
        """
        functions, section = registered(request), request.section
        assert isinstance(section, FilterPruningConfig)
        params = section.params.legr_params or LegrParams()
        level = section.target if params.max_pruning is None else params.max_pruning

        def reward(coefficients: Coefficients) -> float:
            trial = request.candidate(coefficients, level).eval()
            with same_chances(params.random_seed, functions.train_loader, functions.val_loader):
                self._train(functions, trial, params.train_steps)
                return -validated(functions, trial, request.path)[1]

        identity = dict.fromkeys(request.weights, (1.0, 0.0))
        space = Space.around(request, identity, params.scale_sigma)
        size, share = params.population_size, params.mutate_percent
        evolution = Evolution(space, params.generations, size, params.num_samples, share, params.random_seed)
        plain = min(size, params.generations) - 1
        fixed: dict[int, Coefficients] = {plain: identity}
        if plain:  # the result is not worse than the same level in each group either
            fixed[plain - 1] = request.uniform(identity, level)
        found = evolution.run(reward, fixed, request.path)
        return Ranking(dict(found.best), params.generations, "loss", -found.reward, _finite(-found.rewards[plain]))

    def _train(self, functions: LeGRInitArgs, trial: nn.Module, steps: int) -> None:
        if not steps:
            return
        assert functions.train_fn is not None  # see `registered`
        make = functions.train_optimizer or default_optimizer
        with torch.enable_grad():
            optimizer = make([parameter for parameter in trial.parameters() if parameter.requires_grad])
            functions.train_fn(functions.train_loader, trial, optimizer, TrialController(), steps)


def registered(request: RankingRequest) -> LeGRInitArgs:
    """Returns the functions for learned ranking.

    Raises:
        DataError: They were not registered.
    """
    found = request.context.config.get_extra_struct(LeGRInitArgs)
    parts: dict[str, Any] = {"train_steps_fn": None, "val_loader": None, "validate_fn": None}
    if found is not None:
        parts = {"train_steps_fn": found.train_fn, "val_loader": found.val_loader, "validate_fn": found.val_fn}
    missing = [name for name, value in parts.items() if value is None]
    if found is None or missing:
        raise DataError(
            f"{request.path}: 'learned_ranking' trains candidates, and {', '.join(missing)} is missing. Call "
            "register_default_init_args(config, train_loader, train_steps_fn=..., val_loader=..., validate_fn=...); or "
            "use 'adapted_ranking', which needs calibration data only"
        )
    return found


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
