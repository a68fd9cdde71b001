"""From config and trace to a plan: which weights and activations get which quantizer, and why others get none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from compress_core import ConfigError
from compress_core.layers import WeightedLayer, WeightTensor, weight_tensors
from compress_core.scopes import ScopedModule, ScopeFilter, scoped_modules
from compress_core.trace import Call, ForwardTrace, Trace
from compress_core.trace.graph import ValueId
from compress_core.transforms.places import (
    ActivationPlace,
    CallOutput,
    ModuleInput,
    ModuleOutput,
    Path,
    place_from_dict,
)
from compress_quantization.config import QuantizationConfig, QuantizerGroup, RangeConfig
from compress_quantization.operators import LINEAR_KINDS, base_name, is_weight_argument, kind_of
from compress_quantization.placement import Placed, Rules, place_quantizers
from compress_quantization.profiles import Profile
from compress_quantization.quantizer_config import QuantizerPlace, QuantizerSpec, Resolver, check_strict_bits


@dataclass(frozen=True)
class InitialRange:
    """How the range of a quantizer is initialized; see `RangeConfig`.

    Attributes:
        type: The statistic.
        num_init_samples: Samples to collect it on; 0 for none.
        percentiles: For the percentile types: lower and upper one.
    """

    type: str = "mixed_min_max"
    num_init_samples: int = 256
    percentiles: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: RangeConfig) -> InitialRange:
        """Returns what a section says; percentiles are read for those types alone that have them."""
        percentiles = None
        if config.type in ("percentile", "mean_percentile"):
            percentiles = (config.params.min_percentile, config.params.max_percentile)
        return cls(config.type, config.num_init_samples, percentiles)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitialRange:
        """Takes back what `dataclasses.asdict` returned."""
        percentiles = values["percentiles"]
        found = None if percentiles is None else (percentiles[0], percentiles[1])
        return cls(values["type"], values["num_init_samples"], found)

    def to_config(self) -> RangeConfig:
        """Returns a section that says the same."""
        low, high = self.percentiles or (0.1, 99.9)
        params = {"min_percentile": low, "max_percentile": high}
        values = {"type": self.type, "num_init_samples": self.num_init_samples, "params": params}
        return RangeConfig.model_validate(values)


@dataclass(frozen=True)
class PlannedQuantizer:
    """One quantizer.

    Attributes:
        name: What statistics and `bitwidth_per_scope` call it: `<where>|WEIGHT`, `|OUTPUT` or `|INPUT<n>`.
        group: `weights` or `activations`.
        spec: What it is like.
        shape: Shape of its scale, which broadcasts against the tensor.
        parameter: Dotted name of the weight; empty for activations.
        places: Where activations are quantized; empty for weights.
        initial_range: How its range is initialized: type, number of samples and percentiles.
    """

    name: str
    group: QuantizerGroup
    spec: QuantizerSpec
    shape: tuple[int, ...]
    parameter: str = ""
    places: tuple[ActivationPlace, ...] = ()
    initial_range: InitialRange = InitialRange()

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return {
            "name": self.name,
            "group": self.group,
            "spec": self.spec.to_dict(),
            "shape": list(self.shape),
            "parameter": self.parameter,
            "places": [place.to_dict() for place in self.places],
            "initial_range": asdict(self.initial_range),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlannedQuantizer:
        """Takes back what `to_dict` returned."""
        return cls(
            name=values["name"],
            group=values["group"],
            spec=QuantizerSpec.from_dict(values["spec"]),
            shape=tuple(values["shape"]),
            parameter=values["parameter"],
            places=tuple(place_from_dict(place) for place in values["places"]),
            initial_range=InitialRange.from_dict(values["initial_range"]),
        )


@dataclass
class QuantizationPlan:
    """All quantizers of a model.

    Attributes:
        quantizers: Weights first, then activations, each in the order of the forward.
        skipped: What could be quantized -> why it is not.
        potential: Group -> how many quantizers there would be without scopes.
    """

    quantizers: list[PlannedQuantizer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    potential: dict[str, int] = field(default_factory=dict)


class Planner:
    """Makes the plan for one model.

    Args:
        model: The model; it is only read.
        trace: Its trace.
        config: The section.
        profile: The device.
        scopes: The scopes of the document and of the section.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, config: QuantizationConfig, profile: Profile, scopes: ScopeFilter
    ) -> None:
        self._model = model
        self._trace = trace
        self._config = config
        self._profile = profile
        self._scopes = scopes
        self._names = {module.name: module for module in scoped_modules(model)}
        self._calls = call_names(trace, self._names)
        scopes.add({_call_key(*key): name for key, name in self._calls.items()})
        self._reached = trace.reached
        self.resolver = Resolver(config, profile)
        self._plan = QuantizationPlan()

    @property
    def scope_candidates(self) -> list[str]:
        """What scopes can mean: all modules, and calls that are no modules."""
        return [*self._names, *(_call_key(*key) for key in self._calls)]

    def plan(self) -> QuantizationPlan:
        """Returns the plan.

        Raises:
            ConfigError: The device does not offer what the config asks for, or a scope matches no quantizer.
        """
        weights = self._weights()
        activations = self._activations()
        self._plan.quantizers = [*weights.values(), *activations]
        self._plan.potential = self._potential(len(activations))
        problems = self.resolver.dead_entries()
        if problems:
            raise ConfigError(problems)
        check_strict_bits(self._config, self._feeding_one_operator(weights, activations))
        return self._plan

    def _potential(self, activations: int) -> dict[str, int]:
        def demand(call: Call, path: Path) -> QuantizerSpec | None:
            position = path[0] if isinstance(path[0], int) else 0
            return QuantizerSpec() if self._profile.quantizes_input(kind_of(call.function), position) else None

        rules = Rules(demand, output_spec=QuantizerSpec() if self._config.quantize_outputs else None)
        everywhere = len(place_quantizers(self._trace, rules).quantizers)
        weights = len(self._weight_tensors(weight_uses(self._trace)))
        # Where readers of one tensor disagree it gets more than one.
        return {"weights": weights, "activations": max(everywhere, activations)}

    # Weights.

    def _weights(self) -> dict[str, PlannedQuantizer]:
        uses = weight_uses(self._trace)
        first = first_convolutions(self._trace)
        found = {}
        for tensor in self._weight_tensors(uses):
            call = uses.get(tensor.name)
            kind = _weight_kind(tensor, call)
            names = tuple(self._names.get(name, ScopedModule(name)) for name in tensor.module_names)
            place = QuantizerPlace(
                names, "weights", kind, "WEIGHT", first_layer=call is not None and call.index in first
            )
            reason = self._reason_to_skip_weight(tensor, call, place)
            if reason:
                self._plan.skipped[tensor.name] = reason
                continue
            spec = self.resolver.resolve(place)
            shape = _scale_shape(tuple(tensor.shape), _output_dim(tensor, kind) if spec.per_channel else None)
            initial_range = InitialRange.of(self.resolver.range_for(place)[0])
            found[tensor.name] = PlannedQuantizer(
                f"{tensor.module_names[0]}|WEIGHT", "weights", spec, shape, tensor.name, initial_range=initial_range
            )
        return found

    def _weight_tensors(self, uses: Mapping[str, Call]) -> list[WeightTensor]:
        """Returns the weights of layers, and parameters that are used as weights without being in a known layer."""
        tensors = weight_tensors(self._model, self._config.algorithm)
        known = {tensor.name for tensor in tensors}
        parameters = dict(self._model.named_parameters())
        for name in uses:
            if name in parameters and name not in known:
                tensors.append(WeightTensor(name, (name.rpartition(".")[0],), WeightedLayer(), parameters[name]))
        return tensors

    def _reason_to_skip_weight(self, tensor: WeightTensor, call: Call | None, place: QuantizerPlace) -> str | None:
        reason = self._scopes.reason_to_skip(tensor.module_names) or tensor.untouchable
        if reason:
            return reason
        if tensor.parameter is None:
            raise ConfigError(
                f"the weight '{tensor.name}' is computed by a parametrization or a hook (weight_norm, spectral_norm, "
                "prune); remove that first, or name the layer in ignored_scopes"
            )
        if not tensor.parameter.dtype.is_floating_point:
            return f"its dtype is {tensor.parameter.dtype}"
        if not tensor.parameter.numel():
            return "it is empty"
        if call is None and not self._reached.intersection(tensor.module_names):
            self._refuse_unreached_target(tensor, place)
            return "no example input reaches it"
        if not self._profile.quantizes_weights(place.operator):
            return f"the device {self._profile.device} does not quantize weights of '{place.operator}'"
        return self.resolver.reason_to_skip(place)

    def _refuse_unreached_target(self, tensor: WeightTensor, place: QuantizerPlace) -> None:
        asked = [*self._scopes.targeted_by(tensor.module_names), *self.resolver.targeted_by(place)]
        if asked:
            raise ConfigError(
                f"'{asked[0][1]}' asks for '{tensor.name}', which no example input reaches, so how to quantize it is "
                "not known; give input_info or data that does, or narrow the scope",
                path=asked[0][0],
            )

    # Activations.

    def _activations(self) -> list[PlannedQuantizer]:
        output_spec = None
        if self._config.quantize_outputs:
            output_spec = self.resolver.resolve(QuantizerPlace((), "activations", "add", "OUTPUT"))
        rules = Rules(
            self._demand,
            quantize_inputs=self._config.quantize_inputs,
            output_spec=output_spec,
            unify_concat=self._profile.unifies_inputs("concat"),
        )
        placement = place_quantizers(self._trace, rules)
        self._plan.skipped |= placement.unplaced
        return [self._planned(placed) for placed in placement.quantizers]

    def _demand(self, call: Call, path: Path) -> QuantizerSpec | None:
        kind = kind_of(call.function)
        position = path[0] if isinstance(path[0], int) else 0
        if not self._profile.quantizes_input(kind, position):
            return None
        key = self._key(call)
        place = self._place(call, kind, f"INPUT{position}")
        if self._scopes.reason_to_skip([call.module, _call_key(*key)]) or self.resolver.reason_to_skip(place):
            return None
        return self.resolver.resolve(place)

    def _key(self, call: Call) -> tuple[int, int]:
        number = next(n for n, forward in enumerate(self._trace.forwards) if _is_of(call, forward))
        return number, call.index

    def _place(self, call: Call, kind: str, port: str) -> QuantizerPlace:
        names = (self._calls[self._key(call)], *self._module_names([call.module]))
        return QuantizerPlace(names, "activations", kind, port, depthwise=is_depthwise(call, self._trace))

    def _module_names(self, modules: list[str]) -> tuple[ScopedModule, ...]:
        return tuple(self._names.get(name, ScopedModule(name)) for name in modules)

    def _planned(self, placed: Placed) -> PlannedQuantizer:
        port = "OUTPUT" if isinstance(placed.places[0], (ModuleOutput, CallOutput, ModuleInput)) else "INPUT0"
        first = placed.places[0]
        where = _where(first)
        own = self._names_of_place(first, where)
        spec = self.resolver.with_bits(placed.spec, QuantizerPlace(own, "activations", "add", port))
        place = QuantizerPlace((*own, *self._module_names(list(placed.modules))), "activations", "add", port)
        channel = 1 if spec.per_channel and len(placed.shape) > 1 else None
        initial_range = InitialRange.of(self.resolver.range_for(place)[0])
        if placed.is_constant and initial_range.type == "mixed_min_max":
            # The mean over samples of what has none would be one over whatever comes first in its shape.
            initial_range = replace(initial_range, type="min_max")
        return PlannedQuantizer(
            f"{where}|{port}",
            "activations",
            spec,
            _scale_shape(placed.shape, channel),
            places=placed.places,
            initial_range=initial_range,
        )

    def _names_of_place(self, place: ActivationPlace, where: str) -> tuple[ScopedModule, ...]:
        """Returns what scopes can call a quantizer: as it is printed, by its module, by the call that it stands at."""
        if isinstance(place, ModuleInput):
            aliases = () if place.module else ("/nncf_model_input_0",)
            return (ScopedModule(where, (where, *aliases)), *self._module_names([place.module]))
        makes = [call for forward in self._trace.forwards for call in forward.calls if call.module == place.module]
        if isinstance(place, ModuleOutput):
            calls = [self._calls[self._key(call)] for call in makes]
            return (ScopedModule(where, (where,)), *self._module_names([place.module]), *calls)
        same = [self._calls[self._key(call)] for call in makes if call.function == place.function]
        return (ScopedModule(where, (where,)), *same[place.calls.site : place.calls.site + 1])

    def _feeding_one_operator(
        self, weights: Mapping[str, PlannedQuantizer], activations: list[PlannedQuantizer]
    ) -> list[list[tuple[str, QuantizerSpec]]]:
        del activations  # bits of activations follow the operators that demand them
        uses = weight_uses(self._trace)
        groups = []
        for name, quantizer in weights.items():
            call = uses.get(name)
            spec = None if call is None else self._demand(call, (0,))
            if call is not None and spec is not None:
                groups.append([(quantizer.name, quantizer.spec), (f"{call.module}|INPUT0", spec)])
        return groups


def _where(place: ActivationPlace) -> str:
    text = str(place)
    return text.replace(": output", "").replace(" output", "").replace(": ", "/").replace("torch.nn.functional.", "")


def call_names(trace: Trace, modules: Mapping[str, ScopedModule]) -> dict[tuple[int, int], ScopedModule]:
    """Returns (number of the forward, number of the call) -> what scopes can call it.

    A call has a dotted name, `layer1.0.add`, and NNCF's, which count the calls of a function by a module:
    `ResNet/Sequential[layer1]/BasicBlock[0]/__iadd___0`.
    """
    found = {}
    for number, forward in enumerate(trace.forwards):
        counts: Counter[tuple[str, str]] = Counter()
        for call in forward.calls:
            function = base_name(call.function)
            owner = modules.get(call.module, ScopedModule(call.module))
            turn = counts[call.module, call.function]
            counts[call.module, call.function] += 1
            aliases = (function, f"__{function}__", f"__i{function}__")
            addresses = dict.fromkeys(n.rpartition("/")[0] if _is_operator(n) else n for n in owner.nncf_names)
            nncf = tuple(f"{address}/{alias}_{turn}" for address in addresses for alias in aliases)
            found[number, call.index] = ScopedModule(f"{call.module}.{function}".strip("."), nncf)
    return found


def _call_key(forward: int, call: int) -> str:
    return f"call {call} of example {forward}"


def _is_of(call: Call, forward: ForwardTrace) -> bool:
    return call.index < len(forward.calls) and forward.calls[call.index] is call


def _is_operator(nncf_name: str) -> bool:
    return "[" not in nncf_name.rpartition("/")[2] and "/" in nncf_name


def weight_uses(trace: Trace) -> dict[str, Call]:
    """Returns, for each parameter that some call uses as its weight, the first such call."""
    uses: dict[str, Call] = {}
    for forward in trace.forwards:
        for call in forward.calls:
            for path, value in call.inputs:
                name = forward.values[value].parameter
                if name and is_weight_argument(call, path):
                    uses.setdefault(name, call)
    return uses


def is_depthwise(call: Call, trace: Trace) -> bool:
    """Tells whether a call is a convolution with one filter group for each input channel."""
    if not kind_of(call.function).startswith("conv"):
        return False
    groups = call.keywords.get("groups", call.arguments[6] if len(call.arguments) > 6 else 1)
    return isinstance(groups, int) and groups > 1 and groups == _input_channels(call, trace)


def _input_channels(call: Call, trace: Trace) -> int:
    for forward in trace.forwards:
        if _is_of(call, forward):
            return forward.values[call.inputs[0][1]].shape[1]
    return 0


def first_convolutions(trace: Trace) -> set[int]:
    """Returns the calls of convolutions in 2 or 3 dimensions that an input reaches without passing another one."""
    found: set[int] = set()
    for forward in trace.forwards:
        reached: set[ValueId] = {value.index for value in forward.inputs}
        for call in forward.calls:
            if not any(value in reached for _, value in call.inputs):
                continue
            if kind_of(call.function) in ("conv2d", "conv3d"):
                found.add(call.index)
            elif kind_of(call.function) not in LINEAR_KINDS:
                reached.update(call.results)
    return found


def _weight_kind(tensor: WeightTensor, call: Call | None) -> str:
    kind = kind_of(tensor.layer.operator if call is None else call.function)
    # Projections of attention are linear layers; so is, for want of better, what users have registered.
    return kind if kind in LINEAR_KINDS - {"matmul"} else "linear"


def _output_dim(tensor: WeightTensor, kind: str) -> int:
    return 1 if kind.startswith("conv_transpose") else tensor.layer.output_dim


def _scale_shape(shape: tuple[int, ...], channel_dim: int | None) -> tuple[int, ...]:
    if channel_dim is None:
        return (1,)
    return tuple(size if dim == channel_dim else 1 for dim, size in enumerate(shape))
