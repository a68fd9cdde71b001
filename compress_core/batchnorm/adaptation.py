"""Batch-norm adaptation: running statistics that fit the compressed model, before fine-tuning starts.

Compression changes the output of every layer, while the running statistics still describe the uncompressed model. One
pass over a few calibration samples corrects them. It runs once, after every algorithm has committed and calibrated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema
from torch import nn

from compress_core.config.sections import Count, InitializerConfig, Scopes

if TYPE_CHECKING:
    from compress_core.contract.context import Context
from compress_core.batchnorm.estimators import METHOD
from compress_core.batchnorm.forward_pass import AdaptationPass, Reference
from compress_core.batchnorm.guard import MetricGuard
from compress_core.batchnorm.report import AdaptationReport, BatchNormAdaptationStatistics
from compress_core.config.scopes import ScopeFilter
from compress_core.contract.choices import ChoiceOf, choices_of, find_choice
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.initializer import Initializer, Phase
from compress_core.contract.statistics import Statistics
from compress_core.data.calibration import BNAdaptationInitArgs, CalibrationData, ModelEvaluationArgs
from compress_core.data.rng import preserved_rng
from compress_core.errors import ConfigError, DataError, ModelError, Problem, StateError, UsageError
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.model_wide import bypass_transforms

logger = logging.getLogger(__name__)

# Samples for the provisional statistics during calibration; 64 samples are within 0.5 points of 2048 in accuracy.
_READING = "reading data for batch-norm adaptation"
_PROVISIONAL_SAMPLES = 256

# Dotted name of a layer -> running mean, running variance, number of batches tracked.
SavedStatistics = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class BatchNormAdaptationConfig(InitializerConfig):
    """Section `initializer.batchnorm_adaptation`."""

    num_bn_adaptation_samples: Count = Field(
        2000, ge=0, description="samples to adapt with, rounded to the nearest whole number of batches; 0 = off"
    )
    guard: bool | SkipJsonSchema[Callable[[nn.Module], Any]] = Field(
        False,
        description="metric, function (model) -> number, larger is better; true uses that of ModelEvaluationArgs. "
        "If the metric gets worse, the statistics are rolled back",
    )
    method: Annotated[str, ChoiceOf(METHOD)] = Field(
        "paired",
        description="estimator: paired (corrects the trained statistics), exact (population moments), momentum "
        "(NNCF's exponential average)",
    )
    ignored_scopes: Scopes = Field(default_factory=list, description="batch norms to leave unchanged")


class BatchNormAdaptation(Initializer):
    """Corrects the running statistics of batch norm after compression."""

    name = "batchnorm_adaptation"
    Config: ClassVar[type[InitializerConfig]] = BatchNormAdaptationConfig
    struct = BNAdaptationInitArgs
    phase = Phase.STATISTICS

    def __init__(self, config: InitializerConfig, paths: tuple[str, ...]) -> None:
        super().__init__(config, paths)
        self.num_samples = 0
        self.method = "paired"
        self.ignored: dict[str, str] = {}
        self.report: AdaptationReport | None = None
        self.guard: Callable[[nn.Module], Any] | bool = False
        # The trained statistics, and those of our last adaptation: while the layers still hold one of these, adaptation
        # starts from the trained statistics and not from its own earlier result.
        self._origin: SavedStatistics = {}
        self._last: SavedStatistics = {}
        self._observed: tuple[AdaptationPass, list[tuple[Any, int]]] | None = None
        self._bypassable = True
        self._chosen: frozenset[str] | None = None

    @classmethod
    def from_requests(cls, requests: Mapping[str, InitializerConfig]) -> Self:
        """Merges the requests: the largest number of samples, one method.

        Raises:
            ConfigError: Two sections name different methods or guards.
        """
        configs = {p: config for p, config in requests.items() if isinstance(config, BatchNormAdaptationConfig)}
        adaptation = cls(BatchNormAdaptationConfig(), tuple(configs))
        named = {p: config.method for p, config in configs.items() if "method" in config.model_fields_set}
        if len(set(named.values())) > 1:
            raise ConfigError(
                [Problem(f"{p}.method", f"'{m}': adaptation runs once for all, choose one") for p, m in named.items()]
            )
        guards = {p: config.guard for p, config in configs.items() if config.guard is not False}
        if len(set(map(id, guards.values()))) > 1:
            raise ConfigError([Problem(f"{p}.guard", "adaptation runs once for all, choose one guard") for p in guards])
        adaptation.guard = next(iter(guards.values()), False)
        adaptation.method = next(iter(named.values()), adaptation.method)
        for path, config in configs.items():
            adaptation.num_samples = max(adaptation.num_samples, config.num_bn_adaptation_samples)
            adaptation.ignored |= {f"{path}.ignored_scopes.{i}": s for i, s in enumerate(config.ignored_scopes)}
        return adaptation

    @property
    def default_samples(self) -> int:
        """Number of samples when the user calls adaptation without a number."""
        return self.num_samples or BatchNormAdaptationConfig().num_bn_adaptation_samples

    def needs_data(self) -> bool:
        """Returns whether a section asked for adaptation."""
        return self.num_samples > 0

    def check(self, context: Context) -> None:
        """Raises DataError if the config asks for a guard and no metric is registered."""
        self._metric(context)

    def load_state(self, state: Mapping[str, Any], model: nn.Module, context: Context) -> None:
        """Restores the report, and which layers were frozen when the model was created.

        Raises:
            StateError: The state is not an adaptation report.
        """
        self._bypassable = False  # training may have changed weights and statistics, so there is nothing to pair with
        if not state:
            self._chosen = frozenset(self._layers(model, context))
            return
        try:
            self.report = TypeAdapter(AdaptationReport).validate_python(dict(state))
        except ValidationError as error:
            raise StateError(
                f"compression_state.initializers.{self.name} is not an adaptation report: {error}"
            ) from error
        self._chosen = frozenset(layer.name for layer in self.report.layers)

    @hookimpl
    def compress_observe(self, model: nn.Module, context: Context) -> None:
        """Saves the trained statistics, and measures the uncompressed model if it will not be available later.

        Raises:
            ConfigError: The config asks for adaptation, but no layer can be adapted.
        """
        layers = self._layers(model, context)
        self._check_scopes(model)
        self._origin = _statistics_of(layers)
        self._chosen = frozenset(layers)
        self._bypassable = context.bypassable
        if not self.num_samples:
            if layers and not self.paths:
                logger.info("no batchnorm_adaptation in the config: the statistics of batch norm are not changed")
            self._record(context, layers)
            return
        if not layers:
            message = "the model has no batch norm with running statistics that could be adapted; remove this section"
            if not context.config.root.unused_values == "warn":
                raise ConfigError([Problem(path, message) for path in self.paths])
            logger.warning("config: %s: %s", ", ".join(self.paths), message)
        self._record(context, layers)
        if layers and not self._bypassable:
            self._observe_reference(model, layers, context)

    @hookimpl
    def compress_initialize(self, model: nn.Module, context: Context) -> None:
        """Runs the adaptation that the config asks for, once."""
        layers = self._layers(model, context)
        if not self.num_samples or not layers:
            return
        data = context.calibration_data(self.paths[0], BNAdaptationInitArgs)
        if self._observed is None:
            self.adapt(model, context, data, self.num_samples, self.method)
            return
        adaptation, batches = self._observed
        self._observed = None
        adaptation.follow(layers)
        with adaptation:
            guard = self._armed_guard(model, context)
            adaptation.run(data, batches)
            self._finish(adaptation, layers, self.num_samples, guard, self._origin)

    def adapt(
        self,
        model: nn.Module,
        context: Context,
        data: CalibrationData,
        num_samples: int,
        method: str,
        reference: Reference | None = None,
    ) -> AdaptationReport:
        """Runs an adaptation.

        Args:
            model: The compressed model.
            context: The context.
            data: The batches.
            num_samples: Number of samples, rounded to whole batches.
            method: The estimator; `paired` becomes `exact` if there is no model to pair with.
            reference: Returns a context manager in which the model computes as the model that its running statistics
                belong to. Used if the model has been trained since it was created; by default there is none.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise DataError(f"{data.path}: num_samples must be a whole number of at least 1, got {num_samples!r}")
        if not isinstance(method, str) or find_choice(method, METHOD) is None:
            raise DataError(f"{data.path}: method must be one of {', '.join(choices_of(METHOD))}, got {method!r}")
        layers = self._layers(model, context)
        if not layers:
            raise ModelError(f"{data.path}: the model has no batch norm with running statistics that could be adapted")
        before = _statistics_of(layers)
        from_origin = self._untouched(before)
        if from_origin and self._bypassable:
            reference = functools.partial(bypass_transforms, model)
        if method == "paired" and reference is None:
            logger.info("batch-norm adaptation: the uncompressed model is gone, using 'exact' for 'paired'")
            method = "exact"
        guard = self._armed_guard(model, context)
        try:
            if from_origin:
                _set_statistics(layers, self._origin)
            with AdaptationPass(model, layers, method, data.path) as adaptation:
                reference = reference if adaptation.needs_reference else None
                adaptation.run(data, data.batches(num_samples, None), reference=reference, total=num_samples)
                return self._finish(adaptation, layers, num_samples, guard, before)
        except BaseException:
            _set_statistics(layers, before)
            raise

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Adapts again; see `CompressionController.adapt_batchnorm`.

        Args:
            model: The compressed model.
            context: The context.
            loader: Batches; by default the data that the model was created with.
            options: `num_samples`, `method`, `reference`; see `adapt`.
        """
        unknown = options.keys() - {"num_samples", "method", "reference"}
        if unknown:
            raise UsageError(f"{self.name} takes num_samples and method, got {', '.join(sorted(unknown))}")
        samples, method = options.get("num_samples"), options.get("method")
        self.adapt(
            model,
            context,
            context.calibration_data("adapt_batchnorm()", BNAdaptationInitArgs, loader),
            self.default_samples if samples is None else samples,
            self.method if method is None else method,
            options.get("reference"),
        )

    @contextlib.contextmanager
    def provisional(self, model: nn.Module, context: Context) -> Iterator[None]:
        """Context manager in which batch norm has approximately the statistics that adaptation will set.

        For calibration: activation ranges measured with the old statistics would be wrong after adaptation. Uses fewer
        samples, and restores the statistics on exit. Does nothing if no section asks for adaptation.
        """
        layers = self._layers(model, context)
        if not self.num_samples or not layers:
            yield
            return
        before = _statistics_of(layers)
        data = context.calibration_data(self.paths[0], BNAdaptationInitArgs)
        if isinstance(data.loader, Iterator):  # can be read only once, and adaptation itself needs it later
            yield
            return
        samples = min(self.num_samples, _PROVISIONAL_SAMPLES)
        # Without the uncompressed model there is nothing to pair with.
        method = self.method if self._bypassable or self.method != "paired" else "exact"
        try:
            with preserved_rng(data.loader), AdaptationPass(model, layers, method, data.path) as adaptation:
                bypass = functools.partial(bypass_transforms, model)
                reference = bypass if adaptation.needs_reference else None
                batches = data.batches(samples, None)
                what = "batch-norm adaptation before calibration"
                adaptation.run(data, batches, reference=reference, total=samples, what=what)
                adaptation.finish(samples)
            yield
        finally:
            _set_statistics(layers, before)

    def statistics(self) -> Statistics | None:
        """Returns figures about the last adaptation, or None if there was none."""
        return None if self.report is None else BatchNormAdaptationStatistics(self.report)

    def _observe_reference(self, model: nn.Module, layers: dict[str, AnyBatchNorm], context: Context) -> None:
        adaptation = AdaptationPass(model, layers, self.method, self.paths[0])
        if not adaptation.needs_reference:
            return
        data = context.calibration_data(self.paths[0], BNAdaptationInitArgs)
        with preserved_rng(data.loader):
            batches = list(data.batches(self.num_samples, _READING))  # the second pass must see the same samples
        with adaptation:
            total, what = sum(size for _, size in batches), "batch norm of the uncompressed model"
            adaptation.run(data, batches, reference=contextlib.nullcontext, compressed=False, total=total, what=what)
        adaptation.restore_statistics()
        self._observed = (adaptation, batches)

    def _armed_guard(self, model: nn.Module, context: Context) -> MetricGuard | None:
        evaluate = self._metric(context)
        return None if evaluate is None else MetricGuard(evaluate, model, f"{self.paths[0]}.guard")

    def _metric(self, context: Context) -> Callable[[nn.Module], Any] | None:
        if self.guard is False:
            return None
        if self.guard is True:
            registered = context.config.get_extra_struct(ModelEvaluationArgs)
            if registered is None:
                raise DataError(
                    f"{self.paths[0]}.guard: is true, but no function is registered. Call register_default_init_args("
                    "..., model_eval_fn=...), register ModelEvaluationArgs(eval_fn), or give the function itself"
                )
            return registered.eval_fn
        return self.guard

    def _finish(
        self,
        adaptation: AdaptationPass,
        layers: dict[str, AnyBatchNorm],
        num_samples: int,
        guard: MetricGuard | None,
        before: SavedStatistics,
    ) -> AdaptationReport:
        report = adaptation.finish(num_samples)
        if guard is not None:
            verdict = guard.verdict()
            report = dataclasses.replace(report, guard=verdict)
            if not verdict.kept:
                _set_statistics(layers, before)
        if 2 * report.samples < num_samples:
            logger.warning(
                "batch-norm adaptation: %d samples were asked for, the data loader gave %d",
                num_samples,
                report.samples,
            )
        self._last = _statistics_of(layers)
        self.report = report
        return report

    def _untouched(self, now: SavedStatistics) -> bool:
        """Returns whether the layers hold the trained statistics or those of our last adaptation."""
        return bool(self._origin) and (_same(now, self._last) or _same(now, self._origin))

    def _layers(self, model: nn.Module, context: Context) -> dict[str, AnyBatchNorm]:
        """Returns the batch norms to adapt: with running statistics, not frozen, not in an ignored scope.

        Layers that were frozen when the model was created stay frozen, so that `model.eval()` does not make them
        adaptable.
        """
        root = context.config.root
        ignored = {f"ignored_scopes.{i}": scope for i, scope in enumerate(root.ignored_scopes)} | self.ignored
        scopes = ScopeFilter(model, ignored)
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, AnyBatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
            and not _is_frozen(module, model)
            and (self._chosen is None or name in self._chosen)
            and scopes.reason_to_skip([name]) is None
        }

    def _check_scopes(self, model: nn.Module) -> None:
        norms = [name for name, module in model.named_modules() if isinstance(module, AnyBatchNorm)]
        ScopeFilter(model, self.ignored).check(norms)

    def _record(self, context: Context, layers: Iterable[str]) -> None:
        effect = f"adapts with {self.num_samples} samples, {self.method}" if self.num_samples else "adaptation is off"
        modules = layers if self.num_samples else ()
        for path in self.paths:
            for leaf, value, _ in context.request(path).given_leaves(f"{path}."):
                context.ledger.record(leaf, value, effect, modules)


def _is_frozen(layer: AnyBatchNorm, model: nn.Module) -> bool:
    """Returns whether the user froze this layer's statistics: eval mode in a model that trains, or momentum 0."""
    return (model.training and not layer.training) or layer.momentum == 0.0


def _statistics_of(layers: Mapping[str, AnyBatchNorm]) -> SavedStatistics:
    found: SavedStatistics = {}
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        tracked = layer.num_batches_tracked
        counter = torch.zeros(()) if tracked is None else tracked.clone()
        found[name] = (layer.running_mean.clone(), layer.running_var.clone(), counter)
    return found


def _set_statistics(layers: Mapping[str, AnyBatchNorm], statistics: SavedStatistics) -> None:
    for name, layer in layers.items():
        assert layer.running_mean is not None and layer.running_var is not None
        mean, var, counter = statistics[name]
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(counter)


def _same(left: SavedStatistics, right: SavedStatistics) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )
