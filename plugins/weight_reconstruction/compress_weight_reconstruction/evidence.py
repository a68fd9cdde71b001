"""What data tells about the weights of a model before anything is removed: for choosing what goes.

One forward of the model as it is, without transforms, gathers for each weight the moments of its inputs and outputs.
The same numbers that a reconstruction solves with then say what removing an element or a channel will cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from compress_core import DataError, ModelError
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import running, without_traces
from compress_core.data.rng import preserved_rng
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms import bypass_transforms
from compress_weight_reconstruction.gathering import Gathering
from compress_weight_reconstruction.interception import Interceptor, Use, WeightCall, Weights
from compress_weight_reconstruction.marks import first_names
from compress_weight_reconstruction.norms import call_at_norms, scale_of
from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.products import Kind, wide
from compress_weight_reconstruction.solvers import Normal
from compress_weight_reconstruction.survey import overlap
from compress_weight_reconstruction.twins import twin_of

_NO_PRODUCT = "no product with it was seen on the data"
# Inputs about their means are then zero, and so would be what it costs to remove any of them.
_CONSTANT = "its inputs were the same at all positions that were seen, so nothing is known about them"
# They only make channels, however often the weight is read as a product elsewhere.
_LOOKUPS = frozenset({"torch.nn.functional.embedding", "torch.nn.functional.embedding_bag"})

# Part of a weight, and how it enters a product: kind, groups, columns first.
_Key = tuple[str, Kind, int, bool]


@dataclass(frozen=True)
class Evidence:
    """What the products of a weight, or of a block of its rows, have shown.

    Attributes:
        name: Dotted name of the parameter.
        rows: First and last row + 1 of the part of the parameter; None for the whole.
        use: How it enters its products; the same for all of them.
        shape: Shape of the parameter, or of the part.
        weight: The values, shape (groups, rows, columns), float32 or float64.
        normal: Moments of its inputs and of its outputs without bias; about their means if a bias or a batch norm is
            there to take up the mean.
        scale: By what the batch norm multiplies each output that alone takes the output, shape (rows of all groups,);
            None without one.
        uses: Number of its products in a forward, over which the moments are means; less than 1 if there are forwards
            without one.
    """

    name: str
    rows: tuple[int, int] | None
    use: Use
    shape: torch.Size
    weight: torch.Tensor
    normal: Normal
    scale: torch.Tensor | None
    uses: float

    def as_matrices(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values in the shape of the parameter, or of the part, as (groups, rows, columns)."""
        return self.use.as_matrices(values)

    def as_weight(self, matrices: torch.Tensor) -> torch.Tensor:
        """Returns matrices in the shape of the parameter, or of the part: the inverse of `as_matrices`."""
        return self.use.as_weight(matrices, self.shape)


@dataclass(frozen=True)
class Findings:
    """What was found about the weights of a model.

    Attributes:
        evidence: Name of a weight -> what was seen of it, by part; the parts do not overlap.
        missing: Name of a weight -> why it has no evidence.
        products: Name of a weight -> what was seen of each way in which it enters products, also of weights without
            evidence: the errors of products add up, even where no single system of equations holds for the weight.
        uncounted: Name of a weight -> why its products are not all that depends on it.
        several: Names of weights that are used in several ways: in products, by other functions.
        samples: Number of samples seen.
    """

    evidence: Mapping[str, list[Evidence]]
    missing: Mapping[str, str]
    products: Mapping[str, list[Evidence]]
    uncounted: Mapping[str, str]
    several: frozenset[str]
    samples: int


def observe(
    model: nn.Module, names: Iterable[str], data: CalibrationData, *, num_samples: int, positions: int
) -> Findings:
    """Runs a model on data, and returns what that tells about its weights.

    The model computes without transforms, and is left as it is; so are random generators. Memory: for each weight as
    `Moments` says, all weights at a time.

    Args:
        model: The model, in any mode; it runs in eval mode.
        names: Dotted names of parameters.
        data: The batches.
        num_samples: Number of samples, rounded up to whole batches.
        positions: Positions of each sample that count, of convolutions and of sequences.

    Raises:
        DataError: There are fewer samples than one, or values that are not finite.
        ModelError: A weight is not finite.
    """
    known, parameters = first_names(model), dict(model.named_parameters(remove_duplicate=False))
    firsts = {name: known[id(parameters[name])] for name in names}
    for name in firsts:
        if not bool(torch.isfinite(parameters[name]).all()):
            raise ModelError(f"{data.path}: the weight '{name}' holds NaN or infinity; repair it before compression")
    with preserved_rng(data.loader), bypass_transforms(model), without_traces(model), running(model), torch.no_grad():
        observer = _Observer(model, frozenset(firsts.values()), Positions(positions, num_samples), data.path)
        for batch, size in data.batches(num_samples, "moments of the inputs of layers"):
            observer.run(data, batch, size)
    products = observer.products()
    seen = {name: products[first] for name, first in firsts.items()}
    reasons = {name: observer.why_not(first, seen[name]) for name, first in firsts.items()}
    uncounted = {name: observer.why_not_all(first, seen[name]) for name, first in firsts.items()}
    named = {name: [dataclasses.replace(part, name=name) for part in parts] for name, parts in seen.items()}
    return Findings(
        evidence={name: parts for name, parts in named.items() if reasons[name] is None},
        missing={name: reason for name, reason in reasons.items() if reason is not None},
        products=named,
        uncounted={name: reason for name, reason in uncounted.items() if reason is not None},
        several=frozenset(name for name, first in firsts.items() if observer.ways(first, seen[name]) > 1),
        samples=observer.samples,
    )


class _Observer:
    """Gathers moments in forwards of a twin of a model.

    Args:
        model: The model.
        wanted: Names of the weights, each the first one of its parameter.
        positions: Chooses positions.
        path: Begins the messages of errors.

    Attributes:
        samples: Number of samples so far.
    """

    def __init__(self, model: nn.Module, wanted: frozenset[str], positions: Positions, path: str) -> None:
        self._model, self._wanted, self._positions, self._path = model, wanted, positions, path
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._gatherings: dict[_Key, Gathering] = {}
        self._constant: set[str] = set()
        self._norms: dict[str, str] = {}
        self._batches = 0
        self.samples = 0
        self._twin = twin_of(model).eval()
        self._interceptor = Interceptor(Weights(self._twin), wanted, self._at_product, before=False, shortcuts={})
        norms = [name for name, module in self._twin.named_modules() if isinstance(module, AnyBatchNorm)]
        call_at_norms(self._twin, norms, self._at_norm)

    def run(self, data: CalibrationData, batch: Any, size: int) -> None:
        """Runs one batch of so many samples."""
        self._batches += 1
        self.samples += size
        with self._interceptor:
            data.call_copy(self._twin, batch)

    def products(self) -> dict[str, list[Evidence]]:
        """Returns for each weight what was seen of its products; the moments are forgotten on the way."""
        return {name: list(self._evidence(name)) for name in sorted(self._wanted)}

    def why_not(self, name: str, products: list[Evidence]) -> str | None:
        """Returns why a weight has no evidence, or None."""
        seen = self._interceptor.seen
        if name in seen.others:
            return f"the model uses it in {seen.others[name][0]}, which is no product with an input"
        if name in self._constant:
            return _CONSTANT
        if not products:
            return _NO_PRODUCT
        parts = [part.rows for part in products]
        if len(set(parts)) < len(parts):
            return "its products are of different kinds"
        return "its products use parts of it that overlap" if overlap(parts) else None

    def ways(self, name: str, products: list[Evidence]) -> int:
        """Returns in how many ways a weight is used: all its products are one, every other function is another."""
        return len(self._interceptor.seen.others.get(name, [])) + bool(products)

    def why_not_all(self, name: str, products: list[Evidence]) -> str | None:
        """Returns why products are not all that depends on the columns of a weight, or None."""
        ways = self._interceptor.seen.others.get(name, [])
        others = [way for way in ways if way.partition(",")[0] not in _LOOKUPS]
        if others:
            return f"the model uses it in {others[0]}, which is no product with an input"
        if name in self._constant:
            return _CONSTANT
        if not products:
            return _NO_PRODUCT
        rows = {row for part in products for row in range(*(part.rows or (0, len(self._parameters[name]))))}
        return None if len(rows) == len(self._parameters[name]) else "parts of it were in no product on the data"

    def _at_norm(self, name: str, values: torch.Tensor) -> None:
        made_by = self._interceptor.maker(values)
        if made_by:
            self._norms[made_by] = name

    def _at_product(self, call: WeightCall) -> None:
        use = call.use
        key = _key(call.name, use)
        if key not in self._gatherings:
            self._gatherings[key] = Gathering(call.name, self._part(call.name, use), use)
        try:
            self._gatherings[key].add(call.product, call, self._positions)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error

    def _part(self, name: str, use: Use) -> torch.Tensor:
        parameter = self._parameters[name.partition("[")[0]].detach()
        return parameter if use.rows is None else parameter[slice(*use.rows)]

    def _evidence(self, name: str) -> Iterator[Evidence]:
        parts = self._interceptor.seen.parts(name)
        for key in [key for key in self._gatherings if key[0] in parts]:
            gathering = self._gatherings.pop(key)
            if gathering.moments is None:
                continue
            uses = [use for use in self._interceptor.seen.calls[key[0]] if _key(key[0], use) == key]
            norm = self._norm(key[0])
            gathering.moments.centred = norm is not None or all(use.bias for use in uses)
            try:
                normal = gathering.moments.finalize()
            except DataError as error:
                raise DataError(f"{self._path}: the layer of '{name}', on the calibration data: {error}") from error
            if _is_constant(normal):
                self._constant.add(name)
                continue
            values = self._part(key[0], uses[0])
            weight = wide(uses[0].as_matrices(values)).contiguous()
            scale = None if norm is None else _scale(norm, normal)
            number = min(gathering.calls / self._batches, gathering.samples / self.samples)
            yield Evidence(name, uses[0].rows, uses[0], values.shape, weight, normal, scale, number)

    def _norm(self, part: str) -> AnyBatchNorm | None:
        """Returns the batch norm that alone takes the output of a part's only product."""
        seen = self._interceptor.seen
        is_alone = seen.readers.get(part, 0) == len(seen.calls[part]) == self._batches
        if not is_alone or part not in self._norms:
            return None
        return cast("AnyBatchNorm", self._model.get_submodule(self._norms[part]))


def _key(part: str, use: Use) -> _Key:
    return part, use.kind, use.groups, use.columns_first


def _is_constant(normal: Normal) -> bool:
    """Returns whether moments about the means are those of inputs that do not vary, and that are not all zero."""
    noise = (normal.rounding * normal.input_mean).square()
    return normal.centred and bool((normal.diagonal() <= noise).all()) and bool(normal.input_mean.any())


def _scale(norm: AnyBatchNorm, normal: Normal) -> torch.Tensor:
    """Returns by what a batch norm multiplies the outputs; without running statistics, their own variance decides."""
    if norm.running_var is not None:
        return scale_of(norm)
    scale = (normal.target_power.flatten() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()
