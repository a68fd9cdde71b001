"""`PrecisionSearch`: what a method that chooses numbers of bits is given, and with what it measures."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress_core import ConfigError, DataError
from compress_core.data.calibration import CalibrationData
from compress_core.data.forwards import running, without_traces
from compress_core.data.progress import progress
from compress_core.data.rng import preserved_rng
from compress_core.transforms.model_wide import evaluating
from compress_core.transforms.weight import resolve_parameter
from compress_quantization.config import PrecisionConfig
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.plan import BitsChoice
from compress_quantization.precision.outputs import ErrorKind, MeanError, kind_of_error, output_tensors
from compress_quantization.quantizer_config import QuantizerSpec

_ATTRIBUTES = ("bits", "narrow_range", "half_range", "smallest_scale")

logger = logging.getLogger(__name__)


def set_spec(module: FakeQuantize, spec: QuantizerSpec) -> None:
    """Gives a quantizer the number of bits of these settings; its range, mode and sign stay."""
    for name in _ATTRIBUTES:
        setattr(module, name, getattr(spec, name))


@dataclass(frozen=True)
class Group:
    """Weights that read the same quantized activations, directly or through one another.

    Attributes:
        weights: Names of their quantizers.
        activations: Names of the quantizers of these activations.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.weights)


class PrecisionSearch:
    """The quantizers of a calibrated model, the bits that they can have, and the means to measure them.

    Attributes:
        config: The section `initializer.precision`. Values that are not read are refused, so read what you use.
        path: Its path in the config, for messages.
        model: The model, in eval mode, with calibrated quantizers.
        device: The `target_device`.

    Args:
        config: See above.
        path: See above.
        model: See above.
        device: See above.
        choices: The numbers of bits that each quantizer can have.
        modules: The quantizers that are in the model, by name.
        unreached: Names of those that no sample has reached: they stay off. Others that are off, because quantization
            begins in a later epoch, are on while something is measured.
        find_data: Returns the calibration data, or raises an error that says how to give it.
        extra: Returns the object of a type that the user has registered with the config, or None.
    """

    def __init__(
        self,
        config: PrecisionConfig,
        path: str,
        model: nn.Module,
        device: str,
        *,
        choices: Sequence[BitsChoice],
        modules: Mapping[str, FakeQuantize],
        unreached: Collection[str] = (),
        find_data: Callable[[], CalibrationData],
        extra: Callable[[type], Any] = lambda kind: None,
    ) -> None:
        self.config, self.path, self.model, self.device = config, path, model, device
        self._modules, self._find_data, self._extra = dict(modules), find_data, extra
        self._off = frozenset(unreached)
        self._choices = {choice.name: choice for choice in choices if choice.name in modules}

    # What can be chosen.

    def restrict(self, bits: Sequence[int] | None) -> None:
        """Leaves only these numbers of bits to choose from, where the device offers any of them; None for all.

        A weight that can have none of them is an error, an activation keeps its number.

        Raises:
            ConfigError: See above; or there is nothing to choose.
        """
        for name, choice in self._choices.items() if bits is not None else ():
            options = {b: spec for b, spec in choice.options.items() if b in (bits or ())}
            if len(choice.options) > 1 and not options and choice.group == "weights":
                raise ConfigError(
                    f"{list(bits or ())}: the device {self.device} offers {sorted(choice.options)} bits for '{name}'",
                    path=f"{self.path}.bits",
                )
            if len(choice.options) > 1:
                own = {self.bits_now[name]: choice.options[self.bits_now[name]]}
                self._choices[name] = replace(choice, options=options or own)
        if all(len(choice.options) == 1 for choice in self.weights):
            raise ConfigError(
                f"there is nothing to choose: with target_device {self.device} and these settings, each weight can "
                "have one number of bits only. Give more numbers in 'bits', do not set weights.bits, or choose a "
                'device that offers several, such as "TRIAL"',
                path=self.path,
            )

    @property
    def weights(self) -> list[BitsChoice]:
        """The weights with a quantizer, in the order in which the forward uses them."""
        found = [choice for choice in self._choices.values() if choice.group == "weights"]
        return sorted(found, key=lambda choice: choice.order)

    @property
    def activations(self) -> list[BitsChoice]:
        """The quantizers of activations, in the order of the forward."""
        return [choice for choice in self._choices.values() if choice.group == "activations"]

    @property
    def bits_now(self) -> dict[str, int]:
        """The present number of bits of each quantizer."""
        return {name: module.bits for name, module in self._modules.items()}

    def choice(self, name: str) -> BitsChoice:
        """Returns what a quantizer can be."""
        return self._choices[name]

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The weights that belong together because they share quantizers of activations; see `Group`."""
        parents: dict[str, str] = {}

        def root(name: str) -> str:
            while (parent := parents.get(name, name)) != name:
                name = parent
            return name

        for weight in self.weights:
            for name in weight.inputs:
                parents[root(name)] = root(weight.name)
        members: dict[str, list[BitsChoice]] = {}
        for weight in self.weights:
            members.setdefault(root(weight.name), []).append(weight)
        return [
            Group(tuple(w.name for w in found), tuple(dict.fromkeys(name for w in found for name in w.inputs)))
            for found in members.values()
        ]

    # Settings for the time of a measurement.

    @contextlib.contextmanager
    def quantized(self, bits: Mapping[str, int] | None = None, *, alone: bool = False) -> Iterator[None]:
        """Context manager in which quantizers have other numbers of bits.

        Args:
            bits: Name -> number of bits; others keep theirs.
            alone: Whether all quantizers that are not named are off.
        """
        wanted = dict(bits or {})
        before = [(m, m.enabled, {n: getattr(m, n) for n in _ATTRIBUTES}) for m in self._modules.values()]
        try:
            for name, module in self._modules.items():
                module.enabled = name not in self._off and (name in wanted or not alone)
                if name in wanted and wanted[name] != module.bits:
                    set_spec(module, self._choices[name].options[wanted[name]])
            yield
        finally:
            for module, enabled, values in before:
                module.enabled = enabled
                for attribute, value in values.items():
                    setattr(module, attribute, value)

    def warn_of_no_effect(self, names: Sequence[str]) -> None:
        """Warns of quantizers whose numbers of bits are the fewest because the output does not depend on them.

        Args:
            names: Names of the quantizers, or of groups of them; no warning if there is none.
        """
        if names:
            logger.warning(
                "%s: on the data, the error of the output does not depend on %d of the weights, such as '%s', so "
                "nothing speaks against the fewest bits for them. If they matter in training, give them bits in "
                "scope_overrides, or name them in ignored_scopes",
                self.path,
                len(names),
                names[0],
            )

    # Data.

    @functools.cached_property
    def data(self) -> CalibrationData:
        """The calibration data."""
        return self._find_data()

    def given(self, kind: type) -> Any:
        """Returns the object of this type that the user has registered with the config, or None."""
        return self._extra(kind)

    @contextlib.contextmanager
    def forwards(self) -> Iterator[None]:
        """Context manager for forwards: in eval mode; they leave no trace, and random generators are put back."""
        with evaluating(self.model), without_traces(self.model), preserved_rng(self.data.loader):
            yield

    def batches(self, samples: int) -> list[tuple[Any, int]]:
        """Returns the first batches of the data, (batch, number of samples), about as many samples as asked for."""
        with preserved_rng(self.data.loader):
            return list(self.data.batches(samples, "reading data for the precision search"))

    def outputs(self, batch: Any) -> list[torch.Tensor]:
        """Returns the floating-point tensors of the model's output for a batch."""
        return output_tensors(self.raw_output(batch), self.path)

    def raw_output(self, batch: Any) -> Any:
        """Returns what the forward of the model returns for a batch."""
        with running(self.model):
            return self.data.call_copy(self.model, batch)

    def weight(self, name: str) -> torch.Tensor:
        """Returns a weight as its layer computes with it, with the present settings of its quantizer.

        Args:
            name: Name of the quantizer.
        """
        owner, attribute = resolve_parameter(self.model, self._choices[name].parameter)
        found: torch.Tensor = getattr(owner, attribute)
        return found

    def error_kind(self, outputs: Sequence[torch.Tensor], *, auto: ErrorKind = "squared") -> ErrorKind:
        """Returns how the error of the output is measured; see `kind_of_error`."""
        return kind_of_error(self.config.output_error, outputs, f"{self.path}.output_error", auto=auto)


class OutputErrors:
    """Measures how far the output is from that of the model without quantizers, on batches that are kept.

    Use it within `search.forwards()`.

    Args:
        search: The search.
        samples: About how many samples.

    Attributes:
        samples: Their number.
        kind: How the error is measured.
    """

    @torch.no_grad()
    def __init__(self, search: PrecisionSearch, samples: int) -> None:
        self._search = search
        self._batches = search.batches(samples)
        self.samples = sum(size for _, size in self._batches)
        with search.quantized(alone=True):
            batches = progress(self._batches, "outputs of the unquantized model", unit="batch")
            self._references = [[t.clone() for t in search.outputs(batch)] for batch, _ in batches]
        if not all(bool(t.isfinite().all()) for tensors in self._references for t in tensors):
            raise DataError(
                f"{search.path}: the output of the unquantized model is not finite on the data, so the error of the "
                "quantized one cannot be measured; check data and weights"
            )
        self.kind = search.error_kind(self._references[0])

    @torch.no_grad()
    def measure(self, bits: Mapping[str, int] | None = None, *, alone: bool = False) -> float:
        """Returns the error with these numbers of bits; see `PrecisionSearch.quantized`."""
        error = MeanError(self.kind)
        with self._search.quantized(bits, alone=alone):
            for (batch, _), reference in zip(self._batches, self._references, strict=True):
                error.update(reference, self._search.outputs(batch))
        return error.value()
