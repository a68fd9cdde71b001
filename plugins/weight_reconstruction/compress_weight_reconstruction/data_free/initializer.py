"""The shared initializer `data_free_correction`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import nn

from compress_core import (
    Context,
    Initializer,
    InitializerConfig,
    Phase,
    Scopes,
    Statistics,
    Table,
    UsageError,
    hookimpl,
)
from compress_core.config.scopes import ScopeFilter
from compress_core.contract.algorithm import NeedsUncompressed
from compress_core.data.forwards import without_traces
from compress_core.pages import Block
from compress_core.torch_internals import AnyBatchNorm
from compress_core.trace import Example
from compress_core.transforms import TransformedWeight, transformed_weights
from compress_core.transforms.weight import parameter_places
from compress_weight_reconstruction.data_free.through import output_moments
from compress_weight_reconstruction.data_free.walk import Place, Walk
from compress_weight_reconstruction.marks import first_names
from compress_weight_reconstruction.report import loaded
from compress_weight_reconstruction.scopes import check_scopes, filter_of, own_scopes
from compress_weight_reconstruction.twins import twin_of

# The variance of a channel is not taken to fall further than to this: estimates of a nearly dead channel are worthless.
_LEAST_VARIANCE = 0.25


class DataFreeCorrectionConfig(InitializerConfig):
    """Section `initializer.data_free_correction`."""

    ignored_scopes: Scopes = Field(default_factory=list, description="layers and batch norms to leave unchanged")


@dataclass(frozen=True)
class Correction:
    """What was corrected behind one weight.

    Attributes:
        name: Dotted name of the weight.
        target: Name of the batch norm or of the bias that was changed.
        mean: Largest change of a channel's mean, in standard deviations of the channel; as it is for a bias.
        variance: Smallest and largest factor on a variance; None for a bias.
    """

    name: str
    target: str
    mean: float
    variance: tuple[float, float] | None


@dataclass(frozen=True)
class CorrectionReport:
    """The result of one correction.

    Attributes:
        corrections: What was corrected, in the order of the forward.
        left_alone: Name of a weight -> why nothing was corrected behind it.
    """

    corrections: tuple[Correction, ...]
    left_alone: Mapping[str, str]


class CorrectionStatistics(Statistics):
    """Statistics of the last correction."""

    def __init__(self, report: CorrectionReport) -> None:
        self.report = report

    def tables(self) -> list[Table]:
        """Returns tables of what was corrected, and of what was left alone."""
        rows = [(c.name, c.target, c.mean, "" if c.variance is None else c.variance) for c in self.report.corrections]
        headers = ("weight", "changed", "largest shift of a mean", "factors on variances")
        tables = [Table("Data-free correction", headers, rows)]
        if self.report.left_alone:
            tables.append(Table("Left alone", ("weight", "reason"), list(self.report.left_alone.items())))
        return tables

    def blocks(self) -> list[Block]:
        """Returns the table of what was corrected."""
        table = self.tables()[0]
        return [table.to_grid()]

    def left_alone(self) -> Mapping[str, str]:
        """Returns the weights behind which nothing was corrected."""
        return self.report.left_alone

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-able values."""
        return asdict(self.report)


class DataFreeCorrection(Initializer):
    """Corrects running means, running variances and biases for what compression has done to weights, without data.

    What batch norms remember of the training data says what each layer's inputs are like. By how much the mean and the
    variance of its outputs change with its weight can then be computed (bias correction: Nagel et al. 2019).
    """

    name = "data_free_correction"
    Config: ClassVar[type[InitializerConfig]] = DataFreeCorrectionConfig
    phase = Phase.WEIGHTS
    needs_uncompressed: ClassVar[NeedsUncompressed] = "creation"
    changes_in_place = True

    config: DataFreeCorrectionConfig

    def __init__(self, config: InitializerConfig, paths: tuple[str, ...]) -> None:
        super().__init__(config, paths)
        self.report: CorrectionReport | None = None
        self._ignored = own_scopes(paths[0], self.config.ignored_scopes)

    def check(self, context: Context) -> None:
        """Raises DataError if there is neither data nor `input_info` to run the model on."""
        context.example(self.paths[0])

    @hookimpl
    def compress_observe(self, model: nn.Module, context: Context) -> None:
        """Checks the scopes."""
        check_scopes(model, self._ignored)

    @hookimpl
    def compress_initialize(self, model: nn.Module, context: Context) -> None:
        """Corrects, once."""
        device = next((parameter.device for parameter in model.parameters()), None)
        example = context.example(self.paths[0], device)
        with context.uncompressed() as reference, torch.no_grad():
            places = _walk(reference, example)
            self.report = _correct(model, reference, places, filter_of(model, context, self._ignored))

    def run_again(self, model: nn.Module, context: Context, loader: Any = None, **options: Any) -> None:
        """Refuses: corrections are relative to the statistics of the uncompressed model.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"{self.name} runs once, when the model is created: it starts from the statistics of the uncompressed "
            "model. With data, use controller.adapt_batchnorm(loader)"
        )

    def load_state(self, state: Mapping[str, Any], model: nn.Module, context: Context) -> None:
        """Restores the report.

        Raises:
            StateError: The state is not the report of a correction.
        """
        if state:
            self.report = loaded(CorrectionReport, state, self.name, "a correction")

    def statistics(self) -> Statistics | None:
        """Returns figures about the correction, or None if there was none."""
        return None if self.report is None else CorrectionStatistics(self.report)


def _walk(reference: nn.Module, example: Example) -> Mapping[str, Place]:
    """Runs the uncompressed model on an example, whose values do not matter, and returns where weights are used."""
    with without_traces(reference):
        twin = twin_of(reference).eval()
        walk, forward = Walk(twin), twin.forward

        def followed(*args: Any, **kwargs: Any) -> Any:
            # Not around the whole call, which also looks after what the forward leaves behind.
            with walk:
                return forward(*args, **kwargs)

        twin.forward = followed
        example.run(twin, example.batch)
    return walk.places()


def _correct(
    model: nn.Module, reference: nn.Module, places: Mapping[str, Place], scopes: ScopeFilter
) -> CorrectionReport:
    names = first_names(model)
    weights = {names[id(w.parameter)]: w for w in transformed_weights(model) if w.parameter.ndim > 1}
    left = {name: "its product was not seen on the example" for name in weights if name not in places}
    corrections = []
    for name, place in places.items():
        if name not in weights:
            continue
        reason = scopes.reason_to_skip([name, name.rpartition(".")[0], *([place.norm] if place.norm else [])])
        found = reason or _corrected(model, reference, name, weights[name], place)
        if isinstance(found, str):
            left[name] = found
        else:
            corrections.append(found)
    return CorrectionReport(tuple(corrections), left)


def _corrected(
    model: nn.Module, reference: nn.Module, name: str, weight: TransformedWeight, place: Place
) -> Correction | str:
    if not place.is_alone:
        return "it is used several times, in parts, or outside of a product"
    if place.given is None:
        return "no batch norm tells what its inputs are like"
    old = dict(reference.named_parameters(remove_duplicate=False))[name].detach().double()
    new = weight.chain(weight.parameter).detach().double()
    if old.shape != new.shape:
        return "it has another shape than in the uncompressed model"
    before, after = (output_moments(values, place.given, place.geometry) for values in (old, new))
    if before is None or after is None:
        return "the channels of its input are not along one dimension"
    shift = after[0] - before[0]
    if place.norm:
        factor = torch.where(before[1] > 0, after[1] / before[1], 1.0).clamp_min(_LEAST_VARIANCE)
        return _correct_norm(cast("AnyBatchNorm", model.get_submodule(place.norm)), name, place.norm, shift, factor)
    return _correct_bias(model, name, place.geometry.use.bias, shift)


def _correct_norm(norm: AnyBatchNorm, name: str, target: str, shift: torch.Tensor, factor: torch.Tensor) -> Correction:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    sizes = shift.abs() / (variance.double() + norm.eps).sqrt()
    mean.copy_(mean.double() + shift)
    variance.copy_(variance.double() * factor)
    return Correction(name, target, float(sizes.max()), (float(factor.min()), float(factor.max())))


def _correct_bias(model: nn.Module, name: str, bias: str, shift: torch.Tensor) -> Correction | str:
    if not bias:
        return "neither a batch norm nor a bias of its own takes up the mean"
    parameter = dict(model.named_parameters(remove_duplicate=False))[bias]
    if any(weight.parameter is parameter for weight in transformed_weights(model)):
        return "its bias is compressed as well"
    if len(parameter_places(model)[id(parameter)]) > 1:
        return "its bias belongs to other layers, too"
    parameter.copy_(parameter.double() - shift)
    return Correction(name, bias, float(shift.abs().max()), None)
