"""`adapted_ranking`: coefficients whose pruned model is best after batch-norm adaptation, without training.

Candidates are judged as in EagleEye (Li et al. 2020, arXiv:2007.02491): accuracies of pruned models with statistics of
the unpruned one say little, those with adapted statistics predict the accuracy after fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress_core import BNAdaptationInitArgs, CalibrationData, Context, DataError, LeGRInitArgs
from compress_core.batchnorm.forward_pass import AdaptationPass
from compress_core.config.scopes import ScopeFilter
from compress_core.data.forwards import without_traces
from compress_core.data.progress import progress
from compress_core.data.structures import tensors_of
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.python_state import copied
from compress_filter_pruning.config import AdaptedParams, FilterPruningConfig
from compress_filter_pruning.evolution import Evolution, Space
from compress_filter_pruning.functions import same_chances, shared_mean, validated
from compress_filter_pruning.importance import layer_norm
from compress_filter_pruning.ranking import RankingRequest
from compress_filter_pruning.statistics import Ranking

# Coefficients are drawn around those that prune the same level in each group, closer than those of LeGR, which starts
# anywhere.
_SIGMA, _WIDTH = 0.5, 0.5
_MUTATED = 0.25
_RIVALS = 4

Batches = Sequence[tuple[Any, int]]


class AdaptedRanking:
    """Coefficients whose pruned model, with adapted batch norms, has the smallest error or the best accuracy."""

    def search(self, request: RankingRequest) -> Ranking:
        """Judges candidates on calibration data; the model itself is not touched.

        Raises:
            DataError: There is no data, or outputs cannot be compared.
        """
        section = request.section
        assert isinstance(section, FilterPruningConfig)
        params = section.params.adapted_params or AdaptedParams()
        level = section.target if params.max_pruning is None else params.max_pruning
        judge = _Judge(request, params)
        normalized = {name: (1 / layer_norm(weight), 0.0) for name, weight in request.weights.items()}
        uniform = request.uniform(normalized, level)
        space = Space.around(request, uniform, _SIGMA, _WIDTH)
        fixed = {0: normalized, 1: uniform}
        size = min(params.population_size, params.candidates)
        evolution = Evolution(space, params.candidates, size, _RIVALS, _MUTATED, params.random_seed)
        found = evolution.run(lambda c: judge.reward(request.candidate(c, level)), fixed, request.path)
        first = found.rewards[0]
        unweighted = judge.sign * first if math.isfinite(first) else None
        return Ranking(dict(found.best), params.candidates, judge.measure, judge.sign * found.reward, unweighted)


class _Judge:
    """Adapts candidates and measures them: by `validate_fn` if it is registered, else by the error of the outputs."""

    def __init__(self, request: RankingRequest, params: AdaptedParams) -> None:
        self._path, self._seed = request.path, params.random_seed
        functions = request.context.config.get_extra_struct(LeGRInitArgs)
        self._functions = None if functions is None or functions.val_fn is None else functions
        self._data = request.context.calibration_data(request.path, BNAdaptationInitArgs)
        with same_chances(self._seed, self._data.loader):
            self._batches = list(self._data.batches(params.calibration_samples, "reading data for the ranking search"))
        self.measure, self.sign = ("error", -1.0) if self._functions is None else ("accuracy", 1.0)
        # The model will be adapted with the scopes of all sections, so candidates are as well.
        scopes = ScopeFilter(request.model, _ignored(request.context))
        self._adapted = [
            name
            for name, layer in _norms(request.model).items()
            if not _is_frozen(layer, request.model) and scopes.reason_to_skip([name]) is None
        ]
        self._expected: list[list[torch.Tensor]] = []
        if self._functions is None:
            reference = copied(request.model).eval()
            with same_chances(self._seed), torch.no_grad():
                self._expected = [
                    _outputs(self._data, reference, batch)
                    for batch, _ in progress(self._batches, "outputs of the uncompressed model", unit="batch")
                ]

    def reward(self, trial: nn.Module) -> float:
        """Returns the accuracy of a candidate, or the negative error; larger is better. The candidate is adapted."""
        loaders = () if self._functions is None else (self._functions.train_loader, self._functions.val_loader)
        with same_chances(self._seed, *loaders):
            self._adapt(trial)
            if self._functions is not None:
                return validated(self._functions, trial, self._path)[0]
            return -shared_mean("error", self._error(trial.eval()))

    def _adapt(self, trial: nn.Module) -> None:
        layers = {name: layer for name, layer in _norms(trial).items() if name in self._adapted}
        if not layers:
            return
        with (
            without_traces(trial, parameters=False),
            AdaptationPass(trial, layers, "exact", self._path) as adaptation,
        ):
            adaptation.run(self._data, self._batches, total=sum(size for _, size in self._batches))
            adaptation.finish(adaptation.samples)

    def _error(self, trial: nn.Module) -> float:
        """Returns the squared error of the outputs as a share of their squares; the mean over all outputs."""
        errors, squares = self._zeros(), self._zeros()
        with torch.no_grad():
            for (batch, _), expected in zip(self._batches, self._expected, strict=True):
                found = _outputs(self._data, trial, batch)
                if [value.shape for value in found] != [value.shape for value in expected]:
                    raise DataError(
                        f"{self._path}: the outputs of a pruned model have other shapes than those of the uncompressed "
                        "one, so that they cannot be compared. Register a metric: register_default_init_args(..., "
                        "val_loader=..., validate_fn=...)"
                    )
                for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
                    errors[number] += float((value.double() - wanted.double()).square().sum())
                    squares[number] += float(wanted.double().square().sum())
        shares = [error / square if square > 0 else error for error, square in zip(errors, squares, strict=True)]
        return math.fsum(shares) / len(shares) if all(map(math.isfinite, shares)) else math.nan

    def _zeros(self) -> list[float]:
        return [0.0] * len(self._expected[0])


def _outputs(data: CalibrationData, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    found = [value.detach().clone() for value in tensors_of(data.call_copy(model, batch)) if value.is_floating_point()]
    if not found:
        raise DataError(
            f"{data.path}: the model returns no floating point tensor, so that candidates cannot be compared with it. "
            "Let forward_fn return what the model returns; or register a metric: register_default_init_args(..., "
            "val_loader=..., validate_fn=...)"
        )
    return found


def _norms(model: nn.Module) -> dict[str, AnyBatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AnyBatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def _ignored(context: Context) -> dict[str, Any]:
    """Returns path -> scope, of what batch-norm adaptation leaves alone."""
    ignored = {f"ignored_scopes.{i}": scope for i, scope in enumerate(context.config.root.ignored_scopes)}
    for path, section in context.requests("batchnorm_adaptation").items():
        scopes = getattr(section, "ignored_scopes", ())
        ignored |= {f"{path}.ignored_scopes.{i}": scope for i, scope in enumerate(scopes)}
    return ignored


def _is_frozen(layer: AnyBatchNorm, model: nn.Module) -> bool:
    return (model.training and not layer.training) or layer.momentum == 0.0
