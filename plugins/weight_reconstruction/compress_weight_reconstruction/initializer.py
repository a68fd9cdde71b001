"""The shared initializer `weight_reconstruction`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import nn

from compress_core import (
    ConfigError,
    Context,
    DataError,
    Initializer,
    InitializerConfig,
    ModelEvaluationArgs,
    Phase,
    Statistics,
    UsageError,
    hookimpl,
)
from compress_core.contract.algorithm import NeedsUncompressed
from compress_core.errors import Problem
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.python_state import copied
from compress_weight_reconstruction.config import WeightReconstructionConfig, WeightReconstructionInitArgs
from compress_weight_reconstruction.reconstruction import Reconstruction, Settings
from compress_weight_reconstruction.report import ReconstructionReport, WeightReconstructionStatistics, loaded
from compress_weight_reconstruction.scopes import check_scopes, filter_of, own_scopes

# Values that have to be the same in all sections that name them.
_SHARED = ("damping", "positions", "memory")


class WeightReconstruction(Initializer):
    """Sets the weights of the compressed model so that each layer's output is that of the uncompressed model."""

    name = "weight_reconstruction"
    Config: ClassVar[type[InitializerConfig]] = WeightReconstructionConfig
    struct = WeightReconstructionInitArgs
    phase = Phase.WEIGHTS
    needs_uncompressed: ClassVar[NeedsUncompressed] = "creation"
    changes_in_place = True

    def __init__(self, config: InitializerConfig, paths: tuple[str, ...]) -> None:
        super().__init__(config, paths)
        self.settings = Settings()
        self.ignored: dict[str, str] = {}
        self.guard: Callable[[nn.Module], Any] | bool = False
        self.report: ReconstructionReport | None = None
        self._frozen: frozenset[str] = frozenset()

    @classmethod
    def from_requests(cls, requests: Mapping[str, InitializerConfig]) -> Self | None:
        """Merges the requests: the largest number of samples; everything else has to agree.

        Raises:
            ConfigError: Two sections contradict each other.
        """
        configs = {p: config for p, config in requests.items() if isinstance(config, WeightReconstructionConfig)}
        samples = max((config.num_samples for config in configs.values()), default=0)
        if not samples:
            return None
        values = {name: _agreed(configs, name) for name in _SHARED}
        guards = {p: config.guard for p, config in configs.items() if config.guard is not False}
        if len(set(map(id, guards.values()))) > 1:
            raise ConfigError(
                [Problem(f"{p}.guard", "reconstruction runs once for all, choose one guard") for p in guards]
            )
        made = cls(next(iter(configs.values())), tuple(configs))
        made.settings = Settings(num_samples=samples, path=next(iter(configs)), **values)
        made.guard = next(iter(guards.values()), False)
        for path, config in configs.items():
            made.ignored |= own_scopes(path, config.ignored_scopes)
        return made

    def check(self, context: Context) -> None:
        """Raises DataError if the config asks for a guard and no metric is registered."""
        self._metric(context)

    def load_state(self, state: Mapping[str, Any], model: nn.Module, context: Context) -> None:
        """Restores the report.

        Raises:
            StateError: The state is not the report of a reconstruction.
        """
        if not state:
            self._frozen = _frozen(model)
            return
        self.report = loaded(ReconstructionReport, state, self.name, "a reconstruction")
        # Training may have changed the modes of layers since.
        self._frozen = frozenset(_norms(model)) - set(self.report.norms)

    @hookimpl
    def compress_observe(self, model: nn.Module, context: Context) -> None:
        """Notes which batch norms the user has frozen, and checks the scopes."""
        self._frozen = _frozen(model)
        check_scopes(model, self.ignored)
        effect = f"reconstructs weights with {self.settings.num_samples} samples"
        for path in self.paths:
            for leaf, value, _ in context.request(path).given_leaves(f"{path}."):
                context.ledger.record(leaf, value, effect)

    @hookimpl
    def compress_initialize(self, model: nn.Module, context: Context) -> None:
        """Reconstructs the weights, once."""
        with context.uncompressed() as reference:
            self._run(model, reference, context, self.settings, None)

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Reconstructs again; called by `controller.initialize`.

        Args:
            model: The compressed model.
            context: The context.
            loader: Batches; by default the data that the model was created with.
            options: `uncompressed_model`, which is required, because the model is not kept after creation; and
                `num_samples`.

        Raises:
            UsageError: There are other options, or no uncompressed model.
        """
        unknown = options.keys() - {"num_samples", "uncompressed_model"}
        if unknown:
            raise UsageError(f"{self.name} takes uncompressed_model and num_samples, got {', '.join(sorted(unknown))}")
        reference = options.get("uncompressed_model")
        if not isinstance(reference, nn.Module):
            raise UsageError(
                f"{self.name}: needs the model with its trained weights, which is not kept after creation; call "
                f'controller.initialize("{self.name}", uncompressed_model=model_before_compression)'
            )
        samples = options.get("num_samples", self.settings.num_samples)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise UsageError(f"{self.name}: num_samples must be a whole number of at least 1, got {samples!r}")
        settings = dataclasses.replace(self.settings, num_samples=samples)
        self._run(model, copied(reference).eval().requires_grad_(False), context, settings, loader)

    def statistics(self) -> Statistics | None:
        """Returns figures about the last reconstruction, or None if there was none."""
        return None if self.report is None else WeightReconstructionStatistics(self.report)

    def _run(self, model: nn.Module, reference: nn.Module, context: Context, settings: Settings, loader: Any) -> None:
        data = context.calibration_data(self.paths[0], WeightReconstructionInitArgs, loader)
        scopes = filter_of(model, context, self.ignored)
        metric = self._metric(context)
        self.report = Reconstruction(model, reference, data, settings, scopes, self._frozen, metric).run()

    def _metric(self, context: Context) -> Callable[[nn.Module], Any] | None:
        if self.guard is False:
            return None
        if self.guard is not True:
            return self.guard
        registered = context.config.get_extra_struct(ModelEvaluationArgs)
        if registered is None:
            raise DataError(
                f"{self.paths[0]}.guard: is true, but no function is registered. Call register_default_init_args("
                "..., model_eval_fn=...), register ModelEvaluationArgs(eval_fn), or give the function itself"
            )
        return registered.eval_fn


def _norms(model: nn.Module) -> dict[str, AnyBatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AnyBatchNorm)}


def _frozen(model: nn.Module) -> frozenset[str]:
    """Returns the batch norms that the user keeps in eval mode while the model trains."""
    return frozenset(name for name, norm in _norms(model).items() if model.training and not norm.training)


def _agreed(configs: Mapping[str, WeightReconstructionConfig], name: str) -> Any:
    given = {p: getattr(config, name) for p, config in configs.items() if name in config.model_fields_set}
    if len(set(given.values())) > 1:
        raise ConfigError(
            [
                Problem(f"{p}.{name}", f"{value}: reconstruction runs once for all, choose one value")
                for p, value in given.items()
            ]
        )
    return next(iter(given.values()), getattr(WeightReconstructionConfig(), name))
