"""Which of several settings wins."""

import json

import pytest

from compress_core import ConfigError
from compress_quantization.config import QuantizationConfig, RangeConfig
from compress_quantization.config_checks import check_config
from compress_quantization.profiles import load_profile
from compress_quantization.quantizer_config import (
    QuantizerSpec,
    Resolver,
    check_strict_bits,
)
from tests.plugins.quantization.config_helpers import place, section


def resolved(where, device="CPU", **values):
    return Resolver(section(**values), load_profile(device)).resolve(where)


WEIGHT = QuantizerSpec(bits=8, mode="symmetric", signed=True, per_channel=True, half_range=True)


def test_defaults_by_device():
    assert resolved(place()) == WEIGHT
    assert resolved(place(), "GPU") == QuantizerSpec(8, "symmetric", True, True, narrow_range=True)
    assert resolved(place(), "TRIAL") == QuantizerSpec(8, "symmetric", None, False, narrow_range=True)
    activation = place(group="activations")
    for device in ("ANY", "CPU", "GPU", "NPU", "TRIAL"):
        assert resolved(activation, device) == QuantizerSpec(8, "symmetric", None, False)
    depthwise = place(group="activations", depthwise=True)
    by_device = {d: resolved(depthwise, d).per_channel for d in ("ANY", "CPU", "GPU", "NPU", "TRIAL")}
    assert by_device == {"ANY": True, "CPU": True, "GPU": True, "NPU": True, "TRIAL": False}
    assert not resolved(depthwise, activations={"per_channel": False}).per_channel


@pytest.mark.parametrize("preset, mode", [("performance", "symmetric"), ("mixed", "asymmetric"), (None, "symmetric")])
@pytest.mark.parametrize("device", ["CPU", "GPU", "TRIAL"])
def test_presets_decide_the_mode_of_activations(preset, mode, device):
    values = {} if preset is None else {"preset": preset}
    assert resolved(place(group="activations"), device, **values).mode == mode
    assert resolved(place(), device, **values).mode == "symmetric"


def test_a_preset_gives_way_and_a_group_does_not():
    attention = place("attn", "activations", "scaled_dot_product_attention", "INPUT0")
    assert resolved(attention, preset="mixed").mode == "symmetric"
    with pytest.raises(ConfigError, match=r"activations.mode: the quantizer 'attn\|INPUT0' .*8 bits symmetric"):
        resolved(attention, activations={"mode": "asymmetric"})


def test_later_settings_win_over_earlier_ones_value_by_value():
    values = {
        "preset": "mixed",
        "weights": {"mode": "asymmetric", "bits": 6, "per_channel": True, "logarithm_scale": True},
        "scope_overrides": {
            "weights": {"{re}conv": {"bits": 5, "signed": True, "mode": "symmetric"}, "conv1": {"bits": 4}}
        },
        "initializer": {"precision": {"bitwidth_per_scope": [[3, "block.conv1|WEIGHT"]]}},
    }
    common = {"per_channel": True, "logarithm_scale": True}
    assert resolved(place("fc"), "TRIAL", **values) == QuantizerSpec(6, "asymmetric", **common)
    assert resolved(place("conv2"), "TRIAL", **values) == QuantizerSpec(5, "symmetric", True, **common)
    assert resolved(place("conv1"), "TRIAL", **values) == QuantizerSpec(4, "symmetric", True, **common)
    assert resolved(place("block.conv1"), "TRIAL", **values) == QuantizerSpec(3, "symmetric", True, **common)
    # Nothing of that is for activations.
    assert resolved(place("block.conv1", "activations"), "TRIAL", **values) == QuantizerSpec(8, "asymmetric")


@pytest.mark.parametrize("device", ["ANY", "CPU", "GPU", "NPU", "TRIAL"])
def test_overrides_of_weights_work_on_every_device(device):
    spec = resolved(place("fc"), device, scope_overrides={"weights": {"fc": {"mode": "asymmetric"}}})
    assert spec.mode == "asymmetric"
    assert not spec.narrow_range
    assert resolved(place("conv"), device).mode == "symmetric"


def test_half_range_is_for_eight_bit_weights_where_accumulators_overflow():
    assert resolved(place(), overflow_fix="disable") == QuantizerSpec(8, "symmetric", True, True, narrow_range=True)
    first, second = place(first_layer=True), place()
    specs = [resolved(p, overflow_fix="first_layer_only") for p in (first, second)]
    assert [(s.half_range, s.narrow_range) for s in specs] == [(True, False), (False, True)]
    assert not any(resolved(first, device).half_range for device in ("GPU", "NPU", "TRIAL"))
    assert not resolved(place(group="activations", first_layer=True)).half_range
    assert not resolved(place(), "NPU", weights={"bits": 4}).narrow_range


def test_what_only_one_operator_lacks_is_found_when_it_is_resolved():
    values = {"scope_overrides": {"weights": {"emb": {"bits": 4}}}}
    check_config(section(**values), "NPU")
    with pytest.raises(ConfigError) as caught:
        resolved(place("emb", operator="embedding"), "NPU", **values)
    (problem,) = caught.value.problems
    assert problem.path == "scope_overrides.weights.emb.bits"
    assert "'emb|WEIGHT'" in problem.message
    assert "4 bits (scope_overrides.weights.emb.bits)" in problem.message
    with pytest.raises(ConfigError, match=r"activations.per_channel: .*offers for activations of 'add'"):
        resolved(place(group="activations", operator="add"), activations={"per_channel": True})
    assert resolved(place(group="activations", depthwise=True), activations={"per_channel": True}).per_channel


def test_quantizers_are_named_by_scope_and_port():
    bits = [[2, "m.a|OUTPUT"], [3, "m.a|INPUT1"], [4, "{re}conv.*WEIGHT$"], [5, "Net/__add___0|INPUT0"]]
    resolver = Resolver(section(initializer={"precision": {"bitwidth_per_scope": bits}}), load_profile("TRIAL"))
    named = {
        2: place("m.a", "activations", port="OUTPUT"),
        3: place("m.a", "activations", port="INPUT1"),
        4: place("x.conv1"),
        5: place("add_0", "activations", "add", "INPUT0", nncf=("Net/__add___0",)),
        8: place("m.a"),
    }
    assert {bits: resolver.resolve(where).bits for bits, where in named.items()} == {bits: bits for bits in named}
    assert resolver.used["initializer.precision.bitwidth_per_scope.3"] == ["add_0|INPUT0"]
    assert resolver.dead_entries(lambda entry: False) == []


def test_scopes_that_match_no_quantizer_are_reported():
    config = section(
        weights={"ignored_scopes": ["conv", "nothing"]},
        scope_overrides={"weights": {"fc": {"per_channel": False}, "absent": {"per_channel": False}}},
        initializer={
            "precision": {"bitwidth_per_scope": [[8, "fc|OUTPUT"]]},
            "range": [{"target_scopes": ["fc", "gone"]}, {"ignored_scopes": ["fc", "lost"], "validate_scopes": False}],
        },
    )
    resolver = Resolver(config, load_profile("CPU"))
    for where in (place("conv"), place("fc")):
        if resolver.reason_to_skip(where) is None:
            resolver.resolve(where)
            resolver.range_for(where)
    assert [problem.path for problem in resolver.dead_entries(lambda entry: False)] == [
        "weights.ignored_scopes.1",
        "scope_overrides.weights.absent",
        "initializer.precision.bitwidth_per_scope.0",
        "initializer.range.0.target_scopes.1",
    ]
    assert "'absent'" in resolver.dead_entries(lambda entry: False)[1].message


def test_scopes_of_a_group_leave_places_alone():
    resolver = Resolver(
        section(weights={"ignored_scopes": "a.b"}, activations={"target_scopes": ["a"]}), load_profile("CPU")
    )
    assert resolver.reason_to_skip(place("a.b.conv")) == "ignored by weights.ignored_scopes.0"
    assert resolver.reason_to_skip(place("a.c")) is None
    assert resolver.reason_to_skip(place("a.b", "activations")) is None
    assert resolver.reason_to_skip(place("c", "activations")) == "not in activations.target_scopes"


def test_each_quantizer_matches_exactly_one_range():
    ranges = [
        {"type": "min_max", "target_scopes": "conv", "target_quantizer_group": "weights"},
        {"type": "threesigma", "target_scopes": ["conv", "fc"], "target_quantizer_group": "activations"},
        {"type": "percentile", "ignored_scopes": ["conv"]},
    ]
    override = {"activations": {"fc": {"initializer": {"range": {"type": "mean_percentile"}}}}}
    resolver = Resolver(section(initializer={"range": ranges}, scope_overrides=override), load_profile("CPU"))
    assert resolver.range_for(place("conv"))[0].type == "min_max"
    assert resolver.range_for(place("conv", "activations"))[1] == "initializer.range.1"
    assert resolver.range_for(place("fc"))[0].type == "percentile"
    chosen, path = resolver.range_for(place("fc", "activations"))
    assert (chosen.type, path) == ("mean_percentile", "scope_overrides.activations.fc.initializer.range")
    plain = Resolver(section(initializer={"range": ranges}), load_profile("CPU"))
    with pytest.raises(ConfigError, match=r"'fc\|OUTPUT' \(activations\) is matched by the entries \[1, 2\]"):
        plain.range_for(place("fc", "activations"))
    with pytest.raises(ConfigError, match=r"'x\|WEIGHT' .* none of the 1 entries"):
        Resolver(section(initializer={"range": ranges[:1]}), load_profile("CPU")).range_for(place("x"))


def test_one_range_object_is_for_everything():
    resolver = Resolver(section(initializer={"range": {"num_init_samples": 0}}), load_profile("CPU"))
    assert resolver.range_for(place()) == (RangeConfig(num_init_samples=0), "initializer.range")


def test_strict_bits_are_held_against_the_placement():
    strict = section(initializer={"precision": {"bitwidth_assignment_mode": "strict"}})
    equal = [("conv|WEIGHT", QuantizerSpec(4)), ("relu|OUTPUT", QuantizerSpec(4))]
    check_strict_bits(strict, [equal])
    mixed = [equal, [("conv|WEIGHT", QuantizerSpec(4)), ("relu|OUTPUT", QuantizerSpec(8))]]
    with pytest.raises(ConfigError, match=r"bitwidth_assignment_mode: .*conv.WEIGHT with 4 bits, relu.OUTPUT with 8"):
        check_strict_bits(strict, mixed)
    check_strict_bits(section(), mixed)


def test_specs_survive_json_and_nothing_else_passes_for_one():
    spec = QuantizerSpec(4, "asymmetric", None, True, logarithm_scale=True)
    assert QuantizerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for wrong in ({"bits": "8"}, {"mode": "odd"}, {"bit": 8}, {"signed": 1}):
        with pytest.raises(ValueError, match="not the settings of a quantizer"):
            QuantizerSpec.from_dict({**spec.to_dict(), **wrong})


def test_fresh_copies_of_the_section_have_unread_overrides():
    config = section(scope_overrides={"weights": {"fc": {"bits": 8}}})
    assert config.scope_overrides.weights["fc"].bits == 8
    copy = config.unread()
    path = "scope_overrides.weights.fc.bits"
    assert [(leaf, value, read) for leaf, value, read in copy.given_leaves() if leaf == path] == [(path, 8, False)]
    Resolver(copy, load_profile("CPU")).resolve(place("fc"))
    assert [read for leaf, _, read in copy.given_leaves() if leaf == path] == [True]


def test_every_key_is_described_in_the_schema():
    def walk(node, where):
        for name, entry in node.get("properties", {}).items():
            assert entry.get("description"), f"{where}.{name}"

    schema = QuantizationConfig.model_json_schema()
    for name, definition in {"": schema, **schema["$defs"]}.items():
        walk(definition, name)
