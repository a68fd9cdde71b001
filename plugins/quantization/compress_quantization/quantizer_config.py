"""Determines the settings of a quantizer, from the device's preferences, preset, group, overrides and bits by scope."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from compress_core import ConfigError, StateError
from compress_core.errors import Problem
from compress_quantization.config import (
    Mode,
    QuantizationConfig,
    QuantizerGroup,
    RangeConfig,
    ScopedRangeConfig,
    ScopeOverride,
)
from compress_quantization.profiles import Profile, Scheme, described
from compress_quantization.quantizer_names import (
    QuantizerPlace,
    below_hint,
    can_name_quantizer,
    quantizer_matcher,
    scope_matcher,
)

logger = logging.getLogger(__name__)

_OVERRIDABLE = ("bits", "mode", "signed", "per_channel")

PRESETS: dict[str, dict[QuantizerGroup, Mode]] = {
    "performance": {"weights": "symmetric", "activations": "symmetric"},
    "mixed": {"weights": "symmetric", "activations": "asymmetric"},
}


@dataclass(frozen=True)
class QuantizerSpec:
    """The settings of a quantizer.

    Attributes:
        bits: Number of bits, 2 to 8.
        mode: `symmetric`: the scale is learned; `asymmetric`: both ends of the range are learned.
        signed: Symmetric mode: whether the grid has values below zero; None to decide it from statistics.
        per_channel: Whether each channel has its own range.
        narrow_range: Symmetric mode: whether the grid leaves out -2^(bits-1), so that it is exactly symmetric.
        half_range: Whether the grid has one bit less than `bits`, so that sums of products cannot overflow 16 bits.
        logarithm_scale: Whether the logarithm of the scale is learned.
        smallest_scale: Smallest step of the grid; 0 if there is none.
    """

    bits: int = 8
    mode: Literal["symmetric", "asymmetric"] = "symmetric"
    signed: bool | None = None
    per_channel: bool = False
    narrow_range: bool = False
    half_range: bool = False
    logarithm_scale: bool = False
    smallest_scale: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizerSpec:
        """Restores an object from what `to_dict` returned.

        Raises:
            StateError: `values` was not returned by `to_dict`.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(dict(values)), strict=True, extra="forbid")
        except (ValidationError, TypeError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            place = ".".join(["spec", *map(str, first["loc"])])
            raise StateError(f"{place}: not the settings of a quantizer: {first['msg']}") from error


@dataclass
class _Request:
    """The requested settings of one quantizer, with the path in the section that requests each of them."""

    bits: int | None = None
    mode: Mode | None = None
    signed: bool | None = None
    per_channel: bool | None = None
    logarithm_scale: bool = False
    paths: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, value: Any, path: str) -> None:
        if value is not None:
            setattr(self, name, value)
            self.paths[name] = path

    def said(self) -> str:
        shown = {"mode": "{}", "bits": "{} bits", "per_channel": "per_channel {}", "signed": "signed {}"}
        return ", ".join(
            f"{text.format(json.dumps(getattr(self, name)) if name != 'mode' else self.mode)} ({self.paths[name]})"
            for name, text in shown.items()
            if name in self.paths
        )


class Resolver:
    """Determines the settings of quantizers, and records which entries of the section were used.

    Paths are relative to the section.

    Args:
        config: The section.
        profile: The device.

    Raises:
        ConfigError: A scope is empty or not a regular expression, or `bitwidth_per_scope` names no quantizer.
    """

    def __init__(self, config: QuantizationConfig, profile: Profile) -> None:
        self._config = config
        self._profile = profile
        self._matchers: dict[str, Callable[[QuantizerPlace], bool]] = {}
        self._own_matchers: dict[str, Callable[[QuantizerPlace], bool]] = {}  # for names of quantizers
        self._validated: list[tuple[str, str]] = []
        self._used: dict[str, list[str]] = {}
        problems = [problem for path, entry, strict in self._entries() if (problem := self._add(path, entry, strict))]
        if problems:
            raise ConfigError(problems)

    @property
    def used(self) -> dict[str, list[str]]:
        """Path of an override, scope, entry or range -> the quantizers that it has matched so far, for the ledger.

        The list is empty for entries that need not match and have not matched.
        """
        ranges = self._config.initializer.range
        scoped = enumerate(ranges if isinstance(ranges, list) else ())
        lenient = [f"initializer.range.{index}" for index, item in scoped if not item.validate_scopes]
        return {**{path: [] for path in (*self._matchers, *lenient)}, **self._used}

    def resolve(self, place: QuantizerPlace) -> QuantizerSpec:
        """Returns the settings of a quantizer.

        Raises:
            ConfigError: The device does not support them for this operator.
        """
        request = self._request(place)
        scheme = self._scheme(request, place)
        bits = request.bits or scheme.bits[0]
        mode = request.mode or scheme.modes[0]
        symmetric = mode == "symmetric"
        half_range = self._half_range(place, bits)
        if symmetric and scheme.signed is not None and request.signed not in (None, scheme.signed):
            raise self._refusal(request, place, "signed", [scheme])
        return QuantizerSpec(
            bits=bits,
            mode=mode,
            signed=(scheme.signed if scheme.signed is not None else request.signed) if symmetric else None,
            per_channel=scheme.per_channel[0] if request.per_channel is None else request.per_channel,
            narrow_range=symmetric and not half_range and _is_narrow(scheme, place, bits),
            half_range=half_range,
            logarithm_scale=request.logarithm_scale,
            smallest_scale=scheme.smallest_scale,
        )

    def with_own(self, spec: QuantizerSpec, place: QuantizerPlace) -> QuantizerSpec:
        """Returns the settings, changed by entries of `scope_overrides` and `bitwidth_per_scope` with its own name.

        Raises:
            ConfigError: The device does not support the result.
        """
        request = _Request()
        for path, override in self._overrides(place, by_name=True):
            for name in _OVERRIDABLE:
                request.take(name, getattr(override, name), f"{path}.{name}")
        request = self._bits_by_scope(place, request)
        if not request.paths:
            return spec
        bits, mode = request.bits or spec.bits, request.mode or spec.mode
        per_channel = spec.per_channel if request.per_channel is None else request.per_channel
        schemes = self._profile.all_schemes(place.group)
        if not any(scheme.fits(bits=bits, mode=mode, per_channel=per_channel) for scheme in schemes):
            raise self._refusal(request, place, next(iter(request.paths)), schemes)
        signed = (spec.signed if request.signed is None else request.signed) if mode == "symmetric" else None
        return replace(spec, bits=bits, mode=mode, per_channel=per_channel, signed=signed)

    def options(self, spec: QuantizerSpec, place: QuantizerPlace) -> dict[int, QuantizerSpec]:
        """Returns the numbers of bits that the device offers for a quantizer if all else stays: bits -> settings.

        Args:
            spec: Its settings.
            place: The operator that it serves. Where the section gives a number of bits, there is no other.
        """
        if "bits" in self._request(place).paths:
            return {spec.bits: spec}
        found: dict[int, QuantizerSpec] = {}
        for scheme in self._profile.schemes(place.group, place.operator, depthwise=place.depthwise):
            is_signed = spec.signed is None or scheme.signed in (None, spec.signed)
            if is_signed and scheme.fits(mode=spec.mode, per_channel=spec.per_channel):
                for bits in scheme.bits:
                    found.setdefault(bits, self._with_bits(spec, bits, scheme, place))
        return found | {spec.bits: spec}

    def has_own_bits(self, place: QuantizerPlace) -> bool:
        """Returns whether the section gives bits to a quantizer by its own name."""
        overrides = self._overrides(place, by_name=True)
        by_scope = self._bits_by_scope(place, _Request()).bits
        return by_scope is not None or any(override.bits is not None for _, override in overrides)

    def _with_bits(self, spec: QuantizerSpec, bits: int, scheme: Scheme, place: QuantizerPlace) -> QuantizerSpec:
        half_range = self._half_range(place, bits)
        is_narrow = spec.mode == "symmetric" and not half_range and _is_narrow(scheme, place, bits)
        smallest = scheme.smallest_scale
        return replace(spec, bits=bits, narrow_range=is_narrow, half_range=half_range, smallest_scale=smallest)

    def range_for(self, place: QuantizerPlace) -> tuple[RangeConfig, str]:
        """Returns the range settings of a quantizer, and their path in the section (empty for the default).

        Raises:
            ConfigError: No entry of the list `initializer.range`, or more than one, matches this quantizer.
        """
        chosen: tuple[RangeConfig, str] | None = None
        for path, override in self._overrides(place, of_range=True):
            assert override.initializer.range is not None
            chosen = override.initializer.range, f"{path}.initializer.range"
        ranges = self._config.initializer.range
        if chosen is not None:
            return chosen
        if ranges is None:
            return RangeConfig(), ""
        if isinstance(ranges, RangeConfig):
            return ranges, "initializer.range"
        found = [index for index, entry in enumerate(ranges) if self._in_range(place, index, entry)]
        if len(found) != 1:
            which = f"the entries {found}" if found else f"none of the {len(ranges)} entries"
            raise ConfigError(
                f"the quantizer '{place}' ({place.group}) is matched by {which}; each quantizer must match exactly "
                "one: change target_scopes, ignored_scopes or target_quantizer_group",
                path="initializer.range",
            )
        self._note(f"initializer.range.{found[0]}", place)
        return ranges[found[0]], f"initializer.range.{found[0]}"

    def reason_to_skip(self, place: QuantizerPlace) -> str | None:
        """Returns why the scopes of `weights` or `activations` exclude a place, or None if they do not.

        The scopes of the section itself and at the top level are not checked.
        """
        group = getattr(self._config, place.group)
        ignored = self._matching(f"{place.group}.ignored_scopes", group.ignored_scopes, place)
        targets = self._matching(f"{place.group}.target_scopes", group.target_scopes, place)
        if ignored:
            return f"ignored by {ignored[0]}"
        return f"not in {place.group}.target_scopes" if group.target_scopes and not targets else None

    def ignored_by_name(self, place: QuantizerPlace) -> str | None:
        """Returns the path of an entry of the group's `ignored_scopes` that is a name of the quantizer, or None."""
        entries = getattr(self._config, place.group).ignored_scopes
        paths = [f"{place.group}.ignored_scopes.{i}" for i, entry in enumerate(entries)]
        found = [path for path, entry in zip(paths, entries, strict=True) if self._own_matchers[path](place)]
        for path in found:
            self._note(path, place)
        return found[0] if found else None

    def targeted_by(self, place: QuantizerPlace) -> list[tuple[str, str]]:
        """Returns (path, entry) of the target scopes of `weights` or `activations` that match a place."""
        entries = getattr(self._config, place.group).target_scopes
        paths = self._matching(f"{place.group}.target_scopes", entries, place)
        return [(path, entries[int(path.rpartition(".")[2])]) for path in paths]

    def dead_entries(self, is_known: Callable[[str], bool]) -> list[Problem]:
        """Returns a problem for each scope that matched no quantizer; call it after all have been resolved.

        An override that a document of NNCF gives to an operator whose inputs have no quantizer does nothing there, and
        is left with a warning.

        Args:
            is_known: Tells whether an entry matches an operator of the model.
        """
        problems = []
        for path, entry in self._validated:
            if path in self._used:
                continue
            if path.startswith("scope_overrides.activations.") and "/" in entry and is_known(entry):
                logger.warning(
                    "%s: has no effect, as in NNCF: no quantizer is at the inputs of these operators%s",
                    path,
                    _hint(path, entry),
                )
                continue
            message = f"the scope '{entry}' matches no quantizer that this could mean. Correct or remove it"
            problems.append(Problem(path, message + _hint(path, entry)))
        return problems

    # The settings that the section requests for a place.

    def _request(self, place: QuantizerPlace) -> _Request:
        request = _Request()
        if (preset := effective_preset(self._config, self._profile)) is not None:
            # Without a path, because a preset is only a preference: an operator need not support its mode.
            request.mode = PRESETS[preset][place.group]
        group = getattr(self._config, place.group)
        request.logarithm_scale = group.logarithm_scale
        for path, options in [(place.group, group), *self._overrides(place)]:
            for name in _OVERRIDABLE:
                request.take(name, getattr(options, name), f"{path}.{name}")
        return self._bits_by_scope(place, request)

    def _bits_by_scope(self, place: QuantizerPlace, request: _Request) -> _Request:
        precision = self._config.initializer.precision
        for index, (bits, _) in enumerate(precision.bitwidth_per_scope if precision else ()):
            path = f"initializer.precision.bitwidth_per_scope.{index}"
            if self._matches(path, place):
                request.take("bits", bits, path)
        return request

    def _overrides(
        self, place: QuantizerPlace, *, by_name: bool = False, of_range: bool = False
    ) -> Iterator[tuple[str, ScopeOverride]]:
        """Yields the overrides for a place: only those that name the quantizer, only those that set a range, or all."""
        overrides: dict[str, ScopeOverride] = getattr(self._config.scope_overrides, place.group)
        for scope, override in overrides.items():
            path = f"scope_overrides.{place.group}.{scope}"
            if by_name and not self._own_matchers[path](place):
                continue
            if of_range and override.initializer.range is None:
                continue
            if self._matches(path, place):
                yield path, override

    def _scheme(self, request: _Request, place: QuantizerPlace) -> Scheme:
        schemes = self._profile.schemes(place.group, place.operator, depthwise=place.depthwise)
        modes = [request.mode] if "mode" in request.paths or request.mode is None else [request.mode, None]
        for mode in modes:
            for scheme in schemes:
                if scheme.fits(bits=request.bits, mode=mode, per_channel=request.per_channel):
                    request.mode = mode
                    return scheme
        culprit = next((name for name in ("bits", "mode", "per_channel") if name in request.paths), "mode")
        raise self._refusal(request, place, culprit, schemes)

    def _refusal(
        self, request: _Request, place: QuantizerPlace, culprit: str, schemes: Sequence[Scheme]
    ) -> ConfigError:
        sign = "" if not schemes or schemes[0].signed is None or culprit != "signed" else ", always signed"
        return ConfigError(
            f"the quantizer '{place}' is asked to be {request.said() or request.mode}, and the device "
            f"{self._profile.device} offers for {place.group} of '{place.operator}': {described(schemes)}{sign}. "
            f"Change this, give these layers another in scope_overrides.{place.group}, ignore them, or set "
            'target_device "TRIAL", which offers everything',
            path=request.paths.get(culprit, ""),
        )

    def _half_range(self, place: QuantizerPlace, bits: int) -> bool:
        if place.group != "weights" or bits != 8 or not self._profile.half_range_weights:
            return False
        fix = self._config.overflow_fix
        return fix == "enable" or (fix == "first_layer_only" and place.first_layer)

    def _in_range(self, place: QuantizerPlace, index: int, entry: ScopedRangeConfig) -> bool:
        path = f"initializer.range.{index}"
        if entry.target_quantizer_group not in (None, place.group):
            return False
        ignored = self._matching(f"{path}.ignored_scopes", entry.ignored_scopes, place)
        targets = self._matching(f"{path}.target_scopes", entry.target_scopes, place)
        return not ignored and (not entry.target_scopes or bool(targets))

    # Matching.

    def _entries(self) -> Iterator[tuple[str, str, bool]]:
        """Yields (path, scope, whether it must match something) for every scope that this class matches."""
        config = self._config
        for group in ("weights", "activations"):
            section = getattr(config, group)
            for key in ("ignored_scopes", "target_scopes"):
                for index, entry in enumerate(getattr(section, key)):
                    yield f"{group}.{key}.{index}", entry, section.validate_scopes
            for scope in getattr(config.scope_overrides, group):
                yield f"scope_overrides.{group}.{scope}", scope, config.validate_scopes
        precision = config.initializer.precision
        for index, (_, entry) in enumerate(precision.bitwidth_per_scope if precision else ()):
            yield f"initializer.precision.bitwidth_per_scope.{index}", entry, config.validate_scopes
        ranges = config.initializer.range
        for index, item in enumerate(ranges if isinstance(ranges, list) else ()):
            for key in ("ignored_scopes", "target_scopes"):
                for position, entry in enumerate(getattr(item, key)):
                    yield f"initializer.range.{index}.{key}.{position}", entry, item.validate_scopes

    def _add(self, path: str, entry: str, strict: bool) -> Problem | None:
        if entry and ".bitwidth_per_scope." in path and not can_name_quantizer(entry):
            return Problem(path, f"'{entry}' names no quantizer: it must end with |WEIGHT, |OUTPUT or |INPUT<n>")
        try:
            self._matchers[path], self._own_matchers[path] = scope_matcher(entry), quantizer_matcher(entry)
        except ValueError as error:
            return Problem(path, str(error))
        if strict:
            self._validated.append((path, entry))
        return None

    def _matches(self, path: str, place: QuantizerPlace) -> bool:
        matched = self._matchers[path](place)
        if matched:
            self._note(path, place)
        return matched

    def _matching(self, path: str, entries: Sequence[str], place: QuantizerPlace) -> list[str]:
        """Returns the paths of the entries of a list that match."""
        return [p for i in range(len(entries)) if self._matches(p := f"{path}.{i}", place)]

    def _note(self, path: str, place: QuantizerPlace) -> None:
        names = self._used.setdefault(path, [])
        if str(place) not in names:
            names.append(str(place))


def _hint(path: str, entry: str) -> str:
    if hint := below_hint(entry):
        return f". {hint}"
    if "activations" not in path or "/" not in entry or "#" in entry or "|" in entry:
        return ""
    behind = rf"{entry}.*\|OUTPUT$" if entry.startswith("{re}") else f"{entry}|OUTPUT"
    return f" ('{behind}' would mean the quantizers behind it)"


def _is_narrow(scheme: Scheme, place: QuantizerPlace, bits: int) -> bool:
    return (place.group == "weights" and bits == 8) if scheme.narrow_range is None else scheme.narrow_range


def effective_preset(config: QuantizationConfig, profile: Profile) -> str | None:
    """Returns the preset that sets the modes on a device, or None."""
    if profile.presets == "never":
        return None
    return config.preset or ("performance" if profile.presets == "always" else None)


def check_strict_bits(config: QuantizationConfig, groups: Sequence[Sequence[tuple[str, QuantizerSpec]]]) -> None:
    """Checks the requirement of `bitwidth_assignment_mode: strict` after placement.

    Args:
        config: The section.
        groups: For each operator, the quantizers of its inputs and its weight: (name, settings).

    Raises:
        ConfigError: The mode is strict, but quantizers of one operator differ in bits.
    """
    precision = config.initializer.precision
    if precision is None or precision.bitwidth_assignment_mode != "strict":
        return
    for group in groups:
        if len({spec.bits for _, spec in group}) > 1:
            shown = ", ".join(f"{name} with {spec.bits} bits" for name, spec in group)
            raise ConfigError(
                f"the mode is strict, and one operator is fed by {shown}; give them the same bits in "
                'bitwidth_per_scope, or set "liberal"',
                path="initializer.precision.bitwidth_assignment_mode",
            )
