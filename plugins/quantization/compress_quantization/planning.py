"""Makes the plan from config and trace: which weights and activations get which quantizer, and why others get none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import torch
from torch import nn

from compress_core import ConfigError
from compress_core.config.scopes import ScopedModule, ScopeFilter, scoped_modules
from compress_core.contract.own_weights import as_tensors
from compress_core.trace import Call, Trace
from compress_core.trace.weights import WeightUse, find_weights
from compress_core.transforms.folding import FOLD_REMEDY
from compress_core.transforms.layers import WeightTensor, own_parameters, weight_tensors
from compress_core.transforms.places import ActivationPlace, CallInput, CallOutput, ModuleInput, Path
from compress_quantization.calls import (
    call_key,
    call_names,
    first_convolutions,
    groups_of,
    is_depthwise,
    is_of,
    owners_of_weights,
    weight_uses,
)
from compress_quantization.config import QuantizationConfig
from compress_quantization.masks import stored_masks
from compress_quantization.operators import LINEAR_KINDS, is_data_argument, kind_of
from compress_quantization.placement import modules_only_in_training, place_quantizers
from compress_quantization.placement_types import Placed, Placement, Rules
from compress_quantization.plan import InitialRange, PlannedQuantizer, QuantizationPlan
from compress_quantization.precision.candidates import PlacedQuantizers, choices_of
from compress_quantization.profiles import Profile
from compress_quantization.quantizer_config import QuantizerSpec, Resolver, check_strict_bits
from compress_quantization.quantizer_names import (
    QuantizerPlace,
    QuantizersByName,
    nncf_input,
    place_name,
    scope_matcher,
)
from compress_quantization.unifying import UnifiedScales

logger = logging.getLogger(__name__)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Planner:
    """Makes the plan for one model.

    Args:
        model: The model; it is only read.
        trace: Its trace.
        config: The section.
        profile: The device.
        scopes: The scopes at the top level and of the section.
        own_weights: The weights of layers of a user's own, from `Context.own_weights`; by default from the trace.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        config: QuantizationConfig,
        profile: Profile,
        scopes: ScopeFilter,
        own_weights: Mapping[str, WeightUse] | None = None,
    ) -> None:
        self._model = model
        self._trace = trace
        self._config = config
        self._profile = profile
        self._scopes = scopes
        self._names = {module.name: module for module in scoped_modules(model)}
        self._calls = call_names(trace, self._names)
        scopes.add({call_key(*key): name for key, name in self._calls.items()})
        weights, own = find_weights(trace), own_parameters(model)
        uses = weights.uses if own_weights is None else own_weights
        self._own = as_tensors(model, {name: use for name, use in uses.items() if name in own})
        self._own_names = {tensor.name: ScopedModule(tensor.name, (tensor.name,)) for tensor in self._own}
        scopes.add(self._own_names)
        # For each forward, the values that are made from weights, and the names of the weights with a quantizer.
        self._made_of_weights, self._quantized = weights.values, frozenset[str]()
        self._by_name = QuantizersByName(scopes)
        self._reached = trace.reached
        self._stored_masks = stored_masks(model)
        self.resolver = Resolver(config, profile)
        # Config path of a group of `unified_scale_ops` -> names of the places of its quantizer, for the ledger.
        self.unified: dict[str, list[str]] = {}
        self._plan = QuantizationPlan()
        # What `choices` needs of the placement: weights and, by number, quantizers of activations with their positions.
        self._weight_places: dict[str, QuantizerPlace] = {}
        self._kept: dict[int, tuple[QuantizerPlace, PlannedQuantizer]] = {}
        self._placement = Placement(())

    @property
    def scope_candidates(self) -> list[str]:
        """Returns everything that scopes can match: modules, and calls that are not modules."""
        calls = (call_key(*key) for key in self._calls)
        return [*self._names, *self._own_names, *calls]

    @property
    def ignored_by_name(self) -> dict[str, list[str]]:
        """Config path of an ignored scope that is a name of quantizers -> these quantizers, for the ledger."""
        return {path: self._by_name.used.get(path, []) for path in self._by_name.entries}

    def plan(self) -> QuantizationPlan:
        """Returns the plan.

        Raises:
            ConfigError: The device does not support what the config asks for, or a scope matches no quantizer.
        """
        weights = self._weights()
        self._quantized = frozenset(weights)
        activations = self._activations()
        self._plan.quantizers = [*weights.values(), *activations]
        problems = self.resolver.dead_entries(self._is_known)
        if problems:
            raise ConfigError(problems)
        check_strict_bits(self._config, self._feeding_one_operator(weights, activations))
        precision = self._config.unread().initializer.precision
        if precision is not None and precision.type != "manual":
            placed = PlacedQuantizers(weights, self._weight_places, self._kept, self._placement.reads)
            self._plan.choices = choices_of(self._trace, placed, self.resolver, self._input_place)
        return self._plan

    def _is_known(self, entry: str) -> bool:
        """Returns whether a scope matches a module or a call."""
        matches = scope_matcher(entry)
        names = (*self._names.values(), *self._calls.values())
        return any(matches(QuantizerPlace((name,), "activations", "", "")) for name in names)

    def _potential(self, rules: Rules, activations: int) -> dict[str, int]:
        outputs = QuantizerSpec() if self._config.quantize_outputs else None
        rules = replace(
            rules,
            demand=self._device_demand,
            output_demand=self._device_output_demand,
            quantize_inputs=True,
            output_spec=outputs,
            exact_outputs=False,
        )
        placement = place_quantizers(self._trace, rules)
        everywhere = len(placement.quantizers) + len(placement.gates)
        weights = len(self._weight_tensors())
        # If readers of a tensor disagree, it gets more than one quantizer.
        return {"weights": weights, "activations": max(everywhere, activations)}

    def _device_demand(self, call: Call, path: Path) -> QuantizerSpec | None:
        """Returns whether the device quantizes an input, whatever the scopes are; settings do not matter."""
        if self._is_weight(call, path):
            return None
        position = path[0] if isinstance(path[0], int) else 0
        return QuantizerSpec() if self._profile.quantizes_input(self._profile.kind_of(call), position) else None

    def _device_output_demand(self, call: Call) -> QuantizerSpec | None:
        needed = self._profile.operator_of(call).output == "required"
        return QuantizerSpec() if needed else None

    def _warn_of_modes(self, placement: Placement, wanted: list[tuple[Placed, QuantizerPlace]], rules: Rules) -> None:
        idle = [str(own) for placed, own in wanted if placement.idle_in_training.intersection(placed.places)]
        fixed = [str(own) for placed, own in wanted if placement.fixed_in_training.intersection(placed.places)]
        anywhere = replace(rules, demand=self._device_demand, output_demand=self._device_output_demand)
        trained = modules_only_in_training(self._trace, anywhere)
        if idle:
            logger.warning(
                "the forward in training mode does not compute the tensors of these quantizers, so they act in eval "
                "mode only: %s. Let both modes call the same functions, or name the quantizers in ignored_scopes",
                _some(idle),
            )
        if fixed:
            logger.warning(
                "in training mode a torch.autograd.Function computes the tensors of these quantizers, and gradients do "
                "not reach what is inside of it, so their ranges stay as they were calibrated: %s. Let both modes call "
                "differentiable functions, or name the quantizers in ignored_scopes",
                _some(fixed),
            )
        trained = [name for name in trained if not self._scopes.reason_to_skip([name])]
        if trained:
            logger.warning(
                "only the forward in training mode runs these modules, so activations inside of them are not "
                "quantized, just weights: %s. If the deployed model does not use them, name them in ignored_scopes",
                _some(trained),
            )

    # Weights.

    def _weights(self) -> dict[str, PlannedQuantizer]:
        uses = weight_uses(self._trace)
        first = first_convolutions(self._trace)
        found = {}
        for tensor in self._weight_tensors():
            call = uses.get(tensor.name)
            kind = _weight_kind(tensor, call)
            names = self._module_names(tensor.module_names)
            if tensor.name.rpartition(".")[2] != "weight":
                # Recurrent layers and attention have several weights, so each has its own name first.
                names = (ScopedModule(tensor.name, (tensor.name,)), *names)
            is_first = any(call is other for other in first)
            place = QuantizerPlace(names, "weights", kind, "WEIGHT", first_layer=is_first)
            by_name, by_scope = self._ignored_by_name(place), self.resolver.reason_to_skip(place)
            reason = by_name or self._reason_to_skip_weight(tensor, call, place) or by_scope
            if reason:
                self._plan.skipped[tensor.name] = reason
                continue
            spec = self.resolver.resolve(place)
            self._weight_places[tensor.name] = place
            groups = 1 if call is None else groups_of(call)
            dim = _output_dim(tensor, kind, groups) if spec.per_channel else None
            shape = _scale_shape(tuple(tensor.shape), dim)
            if dim is not None and kind.startswith("conv_transpose") and groups > 1:
                _say_shared_scales(tensor, dim, groups)
            initial_range = InitialRange.of(self.resolver.range_for(place)[0])
            found[tensor.name] = PlannedQuantizer(
                str(place), "weights", spec, shape, tensor.name, initial_range=initial_range
            )
        return found

    def _weight_tensors(self) -> list[WeightTensor]:
        """Returns the weights of known layers, and those of layers of the user's own."""
        return [*weight_tensors(self._model, self._config.algorithm), *self._own]

    def _is_weight(self, call: Call, path: Path) -> bool:
        """Returns whether an argument is made from a weight that has a quantizer, by a transform of it or in a view."""
        if call.transforms_weight:
            return True
        number = self._forward_of(call)
        if number is None:  # a call in training mode
            return False
        made = next((value for where, value in call.inputs if where == path), -1)
        return not self._quantized.isdisjoint(self._made_of_weights[number].get(made, ()))

    def _reason_to_skip_weight(self, tensor: WeightTensor, call: Call | None, place: QuantizerPlace) -> str | None:
        reason = self._scopes.reason_to_skip((tensor.name, *tensor.module_names)) or tensor.untouchable
        if reason:
            return reason
        if tensor.parameter is None:
            raise ConfigError(
                f"the weight '{tensor.name}' is computed by a parametrization or a hook (weight_norm, spectral_norm, "
                f"prune); {FOLD_REMEDY}, or name the layer in ignored_scopes"
            )
        if tensor.parameter.dtype not in _DTYPES:
            return f"its dtype is {tensor.parameter.dtype}"
        if not tensor.parameter.numel():
            return "it is empty"
        if call is None and not self._reached.intersection(tensor.module_names):
            self._refuse_unreached_target(tensor, place)
            return "no example input reaches it"
        if not self._profile.quantizes_weights(place.operator):
            return f"the device {self._profile.device} does not quantize weights of '{place.operator}'"
        return None

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
        groups = UnifiedScales(self._config.activations, self._trace, self._calls, self._names)
        rules = Rules(
            self._demand,
            self._output_demand,
            self._profile.operator_of,
            exact_outputs="quantize_outputs" in self._config.model_fields_set and not self._config.quantize_outputs,
            quantize_inputs=self._config.quantize_inputs,
            output_spec=output_spec,
            unified_kinds=self._profile.unified_scales,
            unified_calls=groups.calls,
            stored_masks=self._stored_masks,
            quantized_gates=self._profile.quantized_gates,
        )
        self._placement = placement = place_quantizers(self._trace, rules)
        self._plan.skipped |= placement.unplaced
        wanted, numbers = [], []
        for number, placed in enumerate(placement.quantizers):
            own = QuantizerPlace(self._names_of_quantizer(placed), "activations", "add", _port(placed.places[0]))
            reason = self._ignored_by_name(own)
            if reason:
                self._plan.skipped[own.names[0].name] = reason
            else:
                wanted.append((placed, own))
                numbers.append(number)
        gates = self._gates(placement, {place for placed, _ in wanted for place in placed.places})
        if self._config.validate_scopes:
            self._by_name.check()
        self._plan.potential = self._potential(rules, len(wanted) + len(gates))
        self._warn_of_modes(placement, wanted, rules)
        self.unified = {
            path: [f"{place_name(place)}|{_port(place)}" for place in found.places]
            for path, found in groups.check(placement.unified).items()
        }
        planned = [self._planned(placed, own) for placed, own in wanted]
        places = zip((own for _, own in wanted), planned, strict=True)
        self._kept = dict(zip(numbers, places, strict=True))
        return [*planned, *gates]

    def _gates(self, placement: Placement, quantized: Set[ActivationPlace]) -> list[PlannedQuantizer]:
        """Returns the gates that no scope excludes, and that have their quantizers in front and behind."""
        found = []
        for gate in placement.gates:
            key, name = self._key(gate.call), place_name(gate.place)
            modules = [gate.call.module]
            own = ScopedModule(name, (name,))
            place = QuantizerPlace((own, self._calls[key], *self._module_names(modules)), "activations", "", "GATE")
            # All are asked, so that each entry counts as used.
            reasons = [
                self._ignored_by_name(place),
                self._scopes.reason_to_skip([*modules, call_key(*key)]),
                self.resolver.reason_to_skip(place),
            ]
            reason = next(filter(None, reasons), None)
            if reason:
                self._plan.skipped[str(place)] = reason
            elif gate.needs <= quantized:
                found.append(PlannedQuantizer.of_gate(str(place), gate.place))
        return found

    def _ignored_by_name(self, place: QuantizerPlace) -> str | None:
        # Both are asked, so that each entry counts as used.
        paths = [self._by_name.ignoring(place), self.resolver.ignored_by_name(place)]
        return next((f"ignored by {path}" for path in paths if path), None)

    def _demand(self, call: Call, path: Path) -> QuantizerSpec | None:
        if self._is_weight(call, path):
            return None
        kind = self._profile.kind_of(call)
        position = path[0] if isinstance(path[0], int) else 0
        if not self._profile.quantizes_input(kind, position):
            return None
        key, modules = self._key(call), self._modules_of(call)
        place = self._input_place(call, path)
        # Both are asked, so that each entry counts as used.
        reasons = [self._scopes.reason_to_skip([*modules, call_key(*key)]), self.resolver.reason_to_skip(place)]
        if any(reasons):
            return None
        return self.resolver.resolve(place)

    def _modules_of(self, call: Call) -> list[str]:
        return [call.module, *owners_of_weights(call, self._trace)]

    def _input_place(self, call: Call, path: Path) -> QuantizerPlace:
        """Returns the position of a quantizer at an argument of a call."""
        position = path[0] if isinstance(path[0], int) else 0
        names = (self._calls[self._key(call)], *self._module_names(self._modules_of(call)))
        kind, depthwise = self._profile.kind_of(call), is_depthwise(call, self._trace)
        return QuantizerPlace(names, "activations", kind, f"INPUT{position}", depthwise=depthwise)

    def _output_demand(self, call: Call) -> QuantizerSpec | None:
        """Returns the quantizer at the output of an operator, if it needs one to be computed with integers."""
        kind = self._profile.kind_of(call)
        if kind == "concat" or self._profile.operator(kind).output != "required":
            return None  # a concatenation demands nothing, but keeps what others demand
        data = next((path for path, _ in call.inputs if is_data_argument(call, path)), None)
        if data is None or self._demand(call, data) is None:
            return None
        if kind in LINEAR_KINDS - {"matmul"} and not any(self._is_weight(call, path) for path, _ in call.inputs):
            return None
        names = (self._calls[self._key(call)], *self._module_names(self._modules_of(call)))
        return self.resolver.resolve(QuantizerPlace(names, "activations", kind, "OUTPUT"))

    def _key(self, call: Call) -> tuple[int, int]:
        number = self._forward_of(call)
        assert number is not None, "quantizers are placed in forwards in eval mode"
        return number, call.index

    def _forward_of(self, call: Call) -> int | None:
        return next((n for n, forward in enumerate(self._trace.forwards) if is_of(call, forward)), None)

    def _module_names(self, modules: Iterable[str]) -> tuple[ScopedModule, ...]:
        return tuple(self._names.get(name, ScopedModule(name)) for name in modules)

    def _planned(self, placed: Placed, own: QuantizerPlace) -> PlannedQuantizer:
        spec = self.resolver.with_own(placed.spec, own)
        place = replace(own, readers=self._module_names(list(placed.modules)))
        channel = 1 if spec.per_channel and len(placed.shape) > 1 else None
        initial_range = InitialRange.of(self.resolver.range_for(place)[0])
        if placed.is_constant and initial_range.type == "mixed_min_max":
            # The tensor has no sample dimension, so a mean over samples would use an unrelated dimension.
            initial_range = replace(initial_range, type="min_max")
        return PlannedQuantizer(
            str(own),
            "activations",
            spec,
            _scale_shape(placed.shape, channel),
            places=placed.places,
            initial_range=initial_range,
        )

    def _names_of_quantizer(self, placed: Placed) -> tuple[ScopedModule, ...]:
        """Returns the names that scopes can use for a quantizer: as printed, and those of all modules and calls."""
        found: list[ScopedModule] = []
        for place, call in zip(placed.places, placed.calls, strict=True):
            own = ScopedModule(place_name(place), (place_name(place), *self._aliases(place)))
            modules = () if isinstance(place, CallInput | CallOutput) else self._module_names([place.module])
            found += [own, *modules, *(() if call is None else (self._calls[self._key(call)],))]
        return tuple(dict.fromkeys(found))

    @property
    def _inputs(self) -> list[Path]:
        """The paths of tensors among the model's arguments, over all examples."""
        return list(
            dict.fromkeys(path for forward in self._trace.forwards for v in forward.inputs for path in v.inputs)
        )

    def _aliases(self, place: ActivationPlace) -> list[str]:
        """Returns NNCF's name of an input of the model."""
        if not isinstance(place, ModuleInput) or place.module:
            return []
        return [nncf_input(number) for number, path in enumerate(self._inputs) if path == place.argument]

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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def _port(place: ActivationPlace) -> str:
    return "INPUT0" if isinstance(place, CallInput) else "OUTPUT"


def _weight_kind(tensor: WeightTensor, call: Call | None) -> str:
    kind = kind_of(tensor.layer.operator if call is None else call.function)
    # Projections of attention are linear layers, and layers that users registered are treated like these.
    return kind if kind in LINEAR_KINDS - {"matmul"} else "linear"


def _output_dim(tensor: WeightTensor, kind: str, groups: int) -> int | None:
    """Returns the dimension of the output channels, or a dimension of which each output channel uses one entry."""
    if not kind.startswith("conv_transpose"):
        return tensor.layer.output_dim
    # The groups of a transposed convolution are in the dimension of the input channels.
    return 0 if 1 < groups == tensor.shape[0] else 1


def _say_shared_scales(tensor: WeightTensor, dim: int, groups: int) -> None:
    channels, scales = groups * tensor.shape[1], tensor.shape[dim]
    if scales < channels:
        logger.warning(
            "the %d output channels of '%s' share %d scale(s): in a transposed convolution with %d groups, no "
            "dimension of the weight has the output channels",
            channels,
            tensor.name,
            scales,
            groups,
        )


def _scale_shape(shape: tuple[int, ...], channel_dim: int | None) -> tuple[int, ...]:
    if channel_dim is None:
        return (1,)
    return tuple(size if dim == channel_dim else 1 for dim, size in enumerate(shape))
