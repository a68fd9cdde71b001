"""What data tells about the weights of a model before anything is removed: for choosing what goes.

One forward of the model as it is, without transforms, gathers for each weight the moments of its inputs and outputs.
The same numbers that a reconstruction solves with then say what removing an element or a channel will cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

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
from compress_weight_reconstruction.products import (
    wide,
)
from compress_weight_reconstruction.solvers import Normal
from compress_weight_reconstruction.survey import overlap
from compress_weight_reconstruction.twins import twin_of

# Why nothing is known about a weight that is used, e.g., as it is and transposed.
DIFFERENT_KINDS = "its products are of different kinds"


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
    """

    name: str
    rows: tuple[int, int] | None
    use: Use
    shape: torch.Size
    weight: torch.Tensor
    normal: Normal
    scale: torch.Tensor | None

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
        missing: Name of a weight -> why nothing is known about it.
        samples: Number of samples seen.
    """

    evidence: Mapping[str, list[Evidence]]
    missing: Mapping[str, str]
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
    """
    known, parameters = first_names(model), dict(model.named_parameters(remove_duplicate=False))
    firsts = {name: known[id(parameters[name])] for name in names}
    with preserved_rng(data.loader), bypass_transforms(model), without_traces(model), running(model), torch.no_grad():
        observer = _Observer(model, frozenset(firsts.values()), Positions(positions, num_samples))
        samples = 0
        for batch, size in data.batches(num_samples):
            observer.run(data, batch)
            samples += size
    found = observer.found()
    evidence: dict[str, list[Evidence]] = {}
    missing: dict[str, str] = {}
    for name, first in firsts.items():
        result = found[first]
        if isinstance(result, str):
            missing[name] = result
        else:
            evidence[name] = [dataclasses.replace(part, name=name) for part in result]
    return Findings(evidence, missing, samples)


class _Observer:
    """Gathers moments in forwards of a twin of a model.

    Args:
        model: The model.
        wanted: Names of the weights, each the first one of its parameter.
        positions: Chooses positions.
    """

    def __init__(self, model: nn.Module, wanted: frozenset[str], positions: Positions) -> None:
        self._model, self._wanted, self._positions = model, wanted, positions
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._gatherings: dict[str, Gathering] = {}
        self._reasons: dict[str, str] = {}
        self._norms: dict[str, str] = {}
        self._batches = 0
        self._twin = twin_of(model).eval()
        self._interceptor = Interceptor(Weights(self._twin), wanted, self._at_product, before=False, shortcuts={})
        norms = [name for name, module in self._twin.named_modules() if isinstance(module, AnyBatchNorm)]
        call_at_norms(self._twin, norms, self._at_norm)

    def run(self, data: CalibrationData, batch: Any) -> None:
        """Runs one batch."""
        self._batches += 1
        with self._interceptor:
            data.call_copy(self._twin, batch)

    def found(self) -> dict[str, list[Evidence] | str]:
        """Returns for each weight what was seen of its parts, or why that is not enough."""
        return {name: self._why_not(name) or self._evidence(name) for name in sorted(self._wanted)}

    def _at_norm(self, name: str, values: torch.Tensor) -> None:
        made_by = self._interceptor.maker(values)
        if made_by:
            self._norms[made_by] = name

    def _at_product(self, call: WeightCall) -> None:
        use = call.use
        first = self._interceptor.seen.calls[call.name][0]
        if (use.kind, use.groups, use.columns_first) != (first.kind, first.groups, first.columns_first):
            self._reasons[call.name.partition("[")[0]] = DIFFERENT_KINDS
            return
        if call.name not in self._gatherings:
            self._gatherings[call.name] = Gathering(call.name, self._part(call.name, use), use)
        self._gatherings[call.name].add(call.product, call, self._positions)

    def _part(self, name: str, use: Use) -> torch.Tensor:
        parameter = self._parameters[name.partition("[")[0]].detach()
        return parameter if use.rows is None else parameter[slice(*use.rows)]

    def _why_not(self, name: str) -> str | None:
        seen = self._interceptor.seen
        if name in seen.others:
            return f"the model uses it in {seen.others[name]}, which is no product with an input"
        parts = seen.parts(name)
        if not any(part in self._gatherings and self._gatherings[part].moments for part in parts):
            return "no product with it was seen on the data"
        if overlap([seen.calls[part][0].rows for part in parts]):
            return "its products use parts of it that overlap"
        return self._reasons.get(name)

    def _evidence(self, name: str) -> list[Evidence]:
        seen, found = self._interceptor.seen, []
        for part in seen.parts(name):
            gathering = self._gatherings.pop(part, None)
            if gathering is None or gathering.moments is None:
                continue
            moments = gathering.moments
            uses = seen.calls[part]
            is_alone = seen.readers.get(part, 0) == len(uses) == self._batches
            norm = self._norms.get(part, "") if is_alone else ""
            moments.centred = bool(norm) or all(use.bias for use in uses)
            scale = scale_of(cast("AnyBatchNorm", self._model.get_submodule(norm))) if norm else None
            values = self._part(part, uses[0])
            weight = wide(uses[0].as_matrices(values)).contiguous()
            found.append(Evidence(name, uses[0].rows, uses[0], values.shape, weight, moments.finalize(), scale))
        return found
