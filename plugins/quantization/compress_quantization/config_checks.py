"""Checks of the section `quantization` that the schema cannot do and that need no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from compress_core import ConfigError, choice
from compress_core.config import Section
from compress_core.config.scopes import compile_scope
from compress_core.errors import Problem
from compress_quantization.config import (
    PRECISION,
    ActivationsConfig,
    Mode,
    PrecisionConfig,
    QuantizationConfig,
    QuantizerGroup,
    RangeConfig,
    ScopedRangeConfig,
    ScopeOverride,
    WeightsConfig,
)
from compress_quantization.precision.method import PrecisionMethod
from compress_quantization.profiles import Profile, described, devices_with_half_range, load_profile
from compress_quantization.quantizer_config import PRESETS, Resolver, effective_preset

_GROUPS: tuple[QuantizerGroup, ...] = ("weights", "activations")

# Keys of `params` that only NNCF's example scripts read.
_OF_EXAMPLE_SCRIPTS = (
    "batch_multiplier",
    "lr_poly_drop_start_epoch",
    "lr_poly_drop_duration_epochs",
    "disable_wd_start_epoch",
    "base_lr",
    "base_wd",
)


def check_config(config: QuantizationConfig, target_device: str, *, strict: bool = True) -> Profile:
    """Refuses values that contradict each other or the device.

    Checking a value does not count as reading it. At the end, the values that will take effect for any model are read.

    Args:
        config: The section.
        target_device: `target_device` of the config.
        strict: Whether values that can have no effect are refused as well, with the reason; otherwise they stay unread,
            and the core warns about them.

    Returns:
        The profile of the device.

    Raises:
        ConfigError: Lists everything that is wrong; paths are relative to the section.
    """
    profile = load_profile(target_device)
    looked_at = config.unread()
    problems = [
        *_preset(looked_at, profile),
        *_device(looked_at, profile),
        *_precision(looked_at, profile),
        *_ranges(looked_at),
        *_scopes(looked_at),
        *_unified_scales(looked_at),
    ]
    if strict:
        problems += _dead_values(looked_at, profile)
    if not problems:
        _compile(looked_at, profile, problems)
    if problems:
        raise ConfigError(problems)
    _read(config, profile)
    return profile


def _preset(config: QuantizationConfig, profile: Profile) -> Iterator[Problem]:
    if config.preset is None:
        return
    if profile.presets == "never":
        yield Problem(
            "preset", f"{profile.device} has no presets; remove it, and set the modes of weights and activations"
        )
        return
    modes = {group: getattr(config, group).mode for group in _GROUPS}
    if None not in modes.values() and modes != PRESETS[config.preset]:
        yield Problem(
            "preset",
            f"'{config.preset}' decides nothing: weights.mode '{modes['weights']}' and activations.mode "
            f"'{modes['activations']}' say otherwise; remove one or the other",
        )


def _device(config: QuantizationConfig, profile: Profile) -> Iterator[Problem]:
    """Finds settings of groups and overrides that no operator of the device supports."""
    for group in _GROUPS:
        options = getattr(config, group)
        yield from _offered(group, options, None, config, profile, group)
        for scope, override in getattr(config.scope_overrides, group).items():
            path = f"scope_overrides.{group}.{scope}"
            if not override.model_fields_set:
                yield Problem(path, "says nothing; give mode, bits, signed, per_channel or initializer, or remove it")
            yield from _offered(path, override, options, config, profile, group)


def _offered(
    path: str, options: Any, defaults: Any, config: QuantizationConfig, profile: Profile, group: QuantizerGroup
) -> Iterator[Problem]:
    """Yields what is wrong with the settings of a group, or of an override combined with its group."""
    wanted = {
        name: getattr(options, name) if getattr(options, name) is not None else getattr(defaults, name, None)
        for name in ("bits", "mode", "per_channel", "signed")
    }
    schemes = profile.all_schemes(group)
    said = {name: value for name in ("bits", "mode", "per_channel") if (value := getattr(options, name)) is not None}
    fits = {name: wanted[name] for name in ("bits", "mode", "per_channel")}
    if said and not any(scheme.fits(**fits) for scheme in schemes):
        name = next((n for n in said if not any(scheme.fits(**{n: said[n]}) for scheme in schemes)), next(iter(said)))
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in fits.items() if value is not None)
        yield Problem(
            f"{path}.{name}",
            f"{shown}: target_device {profile.device} offers for {group} {described(schemes)}. "
            'Change the value, or set target_device "TRIAL", which offers everything',
        )
        return
    if options.signed is None:
        return
    mode = wanted["mode"] or _preset_mode(config, profile, group) or "symmetric"
    if mode == "asymmetric":
        yield Problem(
            f"{path}.signed",
            f"{json.dumps(options.signed)} means nothing in asymmetric mode, where the range decides; remove it",
        )
    forced = {scheme.signed for scheme in schemes if scheme.fits(bits=wanted["bits"], mode=mode)}
    if len(forced) == 1 and forced.isdisjoint({None, options.signed}):
        yield Problem(
            f"{path}.signed",
            f"{json.dumps(options.signed)}, and target_device {profile.device} only has signed symmetric {group}; "
            'remove it, or set target_device "TRIAL"',
        )


def _preset_mode(config: QuantizationConfig, profile: Profile, group: QuantizerGroup) -> Mode | None:
    preset = effective_preset(config, profile)
    return None if preset is None else PRESETS[preset][group]


def _precision(config: QuantizationConfig, profile: Profile) -> Iterator[Problem]:
    precision, path = config.initializer.precision, "initializer.precision"
    if precision is None:
        return
    method: PrecisionMethod = choice(precision.type, PRECISION)
    for problem in method.check(precision, profile):
        yield Problem(f"{path}.{problem.path}" if problem.path else path, problem.message)
    if method.choose is not None and (method.needs_choice or _bits_offered(profile) - {8}):
        yield from _bits_to_choose(f"{path}.bits", precision, profile)
    first: dict[str, int] = {}
    for index, (bits, scope) in enumerate(precision.bitwidth_per_scope):
        yield from _bits_of_scope(f"{path}.bitwidth_per_scope.{index}", bits, scope, precision, profile)
        if scope in first:
            yield Problem(f"{path}.bitwidth_per_scope.{index}", f"'{scope}' stands in entry {first[scope]} already")
        first.setdefault(scope, index)


def _bits_offered(profile: Profile) -> set[int]:
    return {bits for scheme in profile.all_schemes("weights") for bits in scheme.bits}


def _bits_to_choose(path: str, precision: PrecisionConfig, profile: Profile) -> Iterator[Problem]:
    offered = _bits_offered(profile)
    if len(offered) < 2:
        yield Problem(
            path.rpartition(".")[0],
            f"there is nothing to choose: target_device {profile.device} offers {sorted(offered)} bits for weights. "
            'Remove the section, or set a target_device that offers several, such as "TRIAL" or "NPU"',
        )
    elif "bits" in precision.model_fields_set and offered.isdisjoint(precision.bits):
        yield Problem(
            path,
            f"{list(precision.bits)}: target_device {profile.device} offers {sorted(offered)} bits for weights; give "
            "some of these",
        )


def _bits_of_scope(path: str, bits: int, scope: str, precision: PrecisionConfig, profile: Profile) -> Iterator[Problem]:
    if "bits" in precision.model_fields_set and bits not in precision.bits:
        yield Problem(path, f"{bits} bits are not among initializer.precision.bits {precision.bits}; add them there")
    groups = [group for group in _GROUPS if scope.endswith("|WEIGHT") == (group == "weights")]
    schemes = [s for group in (_GROUPS if scope.startswith("{re}") else groups) for s in profile.all_schemes(group)]
    if not any(scheme.fits(bits=bits) for scheme in schemes):
        yield Problem(
            path,
            f"{bits} bits for '{scope}': target_device {profile.device} offers {described(dict.fromkeys(schemes))}. "
            'Change the value, or set target_device "TRIAL", which offers everything',
        )


def _all_ranges(config: QuantizationConfig) -> Iterator[tuple[str, RangeConfig]]:
    ranges = config.initializer.range
    if isinstance(ranges, RangeConfig):
        yield "initializer.range", ranges
    for index, entry in enumerate(ranges if isinstance(ranges, list) else ()):
        yield f"initializer.range.{index}", entry
    for path, override in _all_overrides(config):
        if override.initializer.range is not None:
            yield f"{path}.initializer.range", override.initializer.range


def _all_overrides(config: QuantizationConfig) -> Iterator[tuple[str, ScopeOverride]]:
    for group in _GROUPS:
        for scope, override in getattr(config.scope_overrides, group).items():
            yield f"scope_overrides.{group}.{scope}", override


def _ranges(config: QuantizationConfig) -> Iterator[Problem]:
    if config.initializer.range == []:
        yield Problem("initializer.range", "is an empty list, so no quantizer has an initial range; remove it")
    for path, entry in _all_ranges(config):
        if "percentile" in entry.type and (low := entry.params.min_percentile) >= (high := entry.params.max_percentile):
            name = "min_percentile" if "min_percentile" in entry.params.model_fields_set else "max_percentile"
            yield Problem(
                f"{path}.params.{name}", f"min_percentile {low} is not below max_percentile {high}; the range is empty"
            )
        if isinstance(entry, ScopedRangeConfig) and not {"target_scopes", "ignored_scopes"} & entry.model_fields_set:
            yield Problem(
                path,
                "an entry of a list says which quantizers it is for; give target_scopes or ignored_scopes "
                '("ignored_scopes": [] for all quantizers), or write one object in place of the list',
            )


def _scope_lists(
    config: QuantizationConfig,
) -> Iterator[tuple[str, QuantizationConfig | WeightsConfig | ActivationsConfig | ScopedRangeConfig]]:
    """Yields every section with target_scopes and ignored_scopes; its path ends in a dot or is empty."""
    yield "", config
    for group in _GROUPS:
        yield f"{group}.", getattr(config, group)
    for path, entry in _all_ranges(config):
        if isinstance(entry, ScopedRangeConfig):
            yield f"{path}.", entry


def _scopes(config: QuantizationConfig) -> Iterator[Problem]:
    for path, section in _scope_lists(config):
        targets = section.target_scopes
        ignored = section.ignored_scopes
        if "target_scopes" in section.model_fields_set and not targets:
            yield Problem(f"{path}target_scopes", "is empty, so nothing is a target; add a scope, or remove it")
        for index, entry in enumerate(targets):
            if entry in ignored:
                yield Problem(
                    f"{path}target_scopes.{index}",
                    f"'{entry}' stands in {path}ignored_scopes as well, which takes precedence; remove one of the two",
                )


def _unified_scales(config: QuantizationConfig) -> Iterator[Problem]:
    path, seen = "activations.unified_scale_ops", dict[str, int]()
    for index, group in enumerate(config.activations.unified_scale_ops):
        if not group:
            yield Problem(f"{path}.{index}", "names no operator; name some, or remove it")
        for entry in group:
            try:
                compile_scope(entry)
            except ValueError as error:
                yield Problem(f"{path}.{index}", str(error))
            if seen.setdefault(entry, index) != index:
                yield Problem(f"{path}.{index}", f"'{entry}' stands in group {seen[entry]} too; merge the two groups")


def _dead_values(config: QuantizationConfig, profile: Profile) -> list[Problem]:
    """Finds values that can have no effect."""
    problems = []
    if config.export_to_onnx_standard_ops is False:
        problems.append(
            Problem(
                "export_to_onnx_standard_ops",
                "false asks for OpenVINO's FakeQuantize operators, which are not written; export uses the standard "
                "QuantizeLinear and DequantizeLinear. Remove it",
            )
        )
    fix = config.overflow_fix
    if "overflow_fix" in config.model_fields_set and fix != "disable" and not profile.half_range_weights:
        problems.append(
            Problem(
                "overflow_fix",
                f"'{fix}' has no effect with target_device {profile.device}, only with "
                f"{', '.join(devices_with_half_range())}; remove it",
            )
        )
    for path, entry in _all_ranges(config):
        if "percentile" not in entry.type:
            problems += [
                Problem(f"{path}.params.{name}", f"has no effect with the type '{entry.type}', only with percentiles")
                for name in _given(entry.params, ("min_percentile", "max_percentile"))
            ]
    return problems + _dead_precision(config.initializer.precision)


def _dead_precision(precision: PrecisionConfig | None) -> list[Problem]:
    if precision is None:
        return []
    path, method = "initializer.precision", choice(precision.type, PRECISION)
    others = [name for name in type(precision).model_fields if name not in ("type", *method.keys)]
    problems = [
        Problem(f"{path}.{name}", f"has no effect with the type '{precision.type}'; remove it")
        for name in _given(precision, others)
    ]
    if precision.type == "manual" and not precision.bitwidth_per_scope:
        problems.append(Problem(path, "has no effect without bitwidth_per_scope; give it, or remove this"))
    if "dump_path" in method.keys and precision.dump_path is not None and not precision.dump_init_precision_data:
        problems.append(Problem(f"{path}.dump_path", "has no effect without dump_init_precision_data; set it to true"))
    return problems


def idle_in_precision(config: QuantizationConfig) -> dict[str, tuple[Any, str]]:
    """Returns values of `initializer.precision` that NNCF reads and that mean nothing here: path -> (value, why)."""
    precision = config.unread().initializer.precision
    if precision is None:
        return {}
    found, path = dict[str, tuple[Any, str]](), "initializer.precision"
    if precision.type == "autoq" and precision.warmup_iter_number is not None:
        why = "the search is deterministic, without a random policy to start from"
        found[f"{path}.warmup_iter_number"] = precision.warmup_iter_number, why
    if precision.type != "manual" and precision.dump_init_precision_data and precision.dump_path is None:
        why = "dump_path names no folder, so nothing is written"
        found[f"{path}.dump_init_precision_data"] = True, why
    return found


def given_to_example_scripts(config: QuantizationConfig) -> dict[str, Any]:
    """Returns the values that only NNCF's example scripts read: path in the section -> value."""
    params = config.params
    return {f"params.{name}": params.__dict__[name] for name in _given(params, _OF_EXAMPLE_SCRIPTS)}


def _given(section: Section, names: Sequence[str]) -> Iterable[str]:
    return [name for name in names if name in section.model_fields_set]


def _compile(config: QuantizationConfig, profile: Profile, problems: list[Problem]) -> None:
    try:
        Resolver(config, profile)
    except ConfigError as error:
        problems.extend(error.problems)


def _read(config: QuantizationConfig, profile: Profile) -> None:
    """Reads the values that take effect later, so that all values left unread have no effect."""
    for name in ("quantize_inputs", "quantize_outputs", "compression_lr_multiplier"):
        getattr(config, name)
    if config.__dict__["export_to_onnx_standard_ops"]:
        _ = config.export_to_onnx_standard_ops
    if profile.half_range_weights or config.__dict__["overflow_fix"] == "disable":
        _ = config.overflow_fix
    if config.params.staged:
        _ = config.params.activations_quant_start_epoch, config.params.weights_quant_start_epoch
    precision = config.initializer.precision
    if precision is not None and precision.unread().type != "manual":
        _ = precision.type
    elif precision is not None and precision.bitwidth_per_scope:
        # The checks have already applied these: they limit the bits of the pairs, and select the type with pairs.
        _ = precision.type, precision.bits
