"""The section `quantization`: NNCF's documents pass, contradictions are named with path, value and remedy."""

import json

import pytest
from pydantic import ValidationError

from compress_core import ConfigError
from compress_core.config.errors import problems_of
from compress_core.config.scopes import ScopedModule
from compress_quantization.config import QuantizationConfig, RangeConfig
from compress_quantization.config_checks import check_config
from compress_quantization.plan import InitialRange
from compress_quantization.profiles import load_profile
from compress_quantization.quantizer_config import (
    QuantizerSpec,
    Resolver,
    check_strict_bits,
)
from compress_quantization.quantizer_names import QuantizerPlace


def section(**values):
    return QuantizationConfig.model_validate({"algorithm": "quantization", **values})


def problems(device="CPU", *, strict=True, **values):
    with pytest.raises(ConfigError) as caught:
        check_config(section(**values), device, strict=strict)
    return {problem.path: problem.message for problem in caught.value.problems}


def place(name="conv", group="weights", operator="conv2d", port=None, nncf=(), **more):
    port = port or ("WEIGHT" if group == "weights" else "OUTPUT")
    return QuantizerPlace((ScopedModule(name, nncf),), group, operator, port, **more)


def resolved(where, device="CPU", **values):
    return Resolver(section(**values), load_profile(device)).resolve(where)


# Documents with every key that NNCF's schema knows, in both forms where it knows two.
NNCF_DOCUMENTS = [
    {},
    {
        "initializer": {"range": {"num_init_samples": 256.0, "type": "mean_min_max"}},
        "preset": "mixed",
        "quantize_inputs": True,
        "quantize_outputs": False,
        "weights": {
            "mode": "symmetric",
            "bits": 8,
            "signed": True,
            "per_channel": True,
            "logarithm_scale": False,
            "ignored_scopes": "{re}fc",
            "target_scopes": ["a", "b"],
            "validate_scopes": False,
        },
        "activations": {
            "bits": 8.0,
            "per_channel": False,
            "unified_scale_ops": [["Net/ReLU[r]/relu_0", "Net/__add___0"]],
        },
        "scope_overrides": {
            "weights": {"Net/NNCFConv2d[conv]/conv2d_0": {"mode": "asymmetric", "per_channel": False}},
            "activations": {"{re}.*first.*": {"mode": "symmetric", "initializer": {"range": {"type": "threesigma"}}}},
        },
        "overflow_fix": "first_layer_only",
        "export_to_onnx_standard_ops": True,
        "compression_lr_multiplier": 10,
        "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2.0},
        "ignored_scopes": "Net/NNCFLinear[fc]/linear_0",
        "target_scopes": ["{re}.*"],
        "validate_scopes": True,
    },
    {
        "initializer": {
            "range": [
                {
                    "type": "percentile",
                    "num_init_samples": 10,
                    "params": {"min_percentile": 0.01, "max_percentile": 99.99},
                    "target_scopes": "{re}conv",
                    "target_quantizer_group": "activations",
                },
                {"type": "min_max", "ignored_scopes": ["{re}conv"], "validate_scopes": False},
            ],
            "precision": {
                "type": "manual",
                "bits": [8],
                "bitwidth_per_scope": [[8, "Net/NNCFConv2d[conv]/conv2d_0|WEIGHT"], [8, "Net/ReLU[r]/relu_0|OUTPUT"]],
                "bitwidth_assignment_mode": "strict",
            },
        }
    },
]


def unread(config):
    return {leaf for leaf, _, read in config.given_leaves() if not read}


@pytest.mark.parametrize("document", NNCF_DOCUMENTS, ids=range(len(NNCF_DOCUMENTS)))
def test_documents_of_nncf_pass_and_everything_in_them_counts(document):
    config = section(**document)
    profile = check_config(config, "CPU")
    if config.params.model_fields_set:
        assert config.params.staged
    resolver = Resolver(config, profile)
    weight, activation = place("fc"), place("first_conv", "activations")
    resolver.resolve(place(nncf=("Net/NNCFConv2d[conv]/conv2d_0",)))
    resolver.resolve(activation)
    for where in (weight, activation):
        InitialRange.of(resolver.range_for(where)[0])
    check_strict_bits(config, [])
    for where in (weight, activation):
        resolver.reason_to_skip(where)
    # The core reads these; unified scales come with placement.
    elsewhere = {"algorithm", "ignored_scopes", "target_scopes", "validate_scopes", "activations.unified_scale_ops.0"}
    assert unread(config) <= elsewhere


def test_a_value_that_is_only_checked_has_not_been_read():
    values = {
        "weights": {"bits": 8, "mode": "symmetric", "ignored_scopes": ["a"]},
        "activations": {"unified_scale_ops": [["a", "b"]], "validate_scopes": False},
        "initializer": {"range": [{"type": "percentile", "target_scopes": "a"}, {"ignored_scopes": "a"}]},
        "scope_overrides": {"weights": {"a": {"per_channel": True, "initializer": {"range": {"type": "min_max"}}}}},
        "overflow_fix": "enable",
        "target_scopes": ["c"],
    }
    config = section(**values)
    everything = {leaf for leaf, _, _ in config.given_leaves()}
    check_config(config, "CPU")
    assert unread(config) == everything - {"overflow_fix"}


def test_entries_of_a_list_and_values_of_overrides_are_read_one_by_one():
    config = section(
        initializer={
            "range": [{"type": "min_max", "target_scopes": "fc"}, {"type": "threesigma", "ignored_scopes": "fc"}]
        },
        scope_overrides={"weights": {"fc": {"bits": 8}, "other": {"bits": 8}}},
    )
    resolver = Resolver(config, load_profile("CPU"))
    resolver.resolve(place("fc"))
    InitialRange.of(resolver.range_for(place("fc"))[0])
    assert {"initializer.range.1.type", "scope_overrides.weights.other.bits"} <= unread(config)
    assert unread(config).isdisjoint({"initializer.range.0.type", "scope_overrides.weights.fc.bits"})


def test_defaults_are_those_of_nncf():
    config = section()
    assert (config.quantize_inputs, config.quantize_outputs, config.overflow_fix) == (True, False, "enable")
    assert not config.params.staged
    staged = section(params={"weights_quant_start_epoch": 3}).params
    assert (staged.staged, staged.activations_quant_start_epoch, staged.weights_quant_start_epoch) == (True, 1, 3)
    default, path = Resolver(config, load_profile("ANY")).range_for(place())
    assert (default.type, default.num_init_samples, path) == ("mixed_min_max", 256, "")
    assert (default.params.min_percentile, default.params.max_percentile) == (0.1, 99.9)


@pytest.mark.parametrize(
    "values, path, words",
    [
        ({"weights": {"bits": 1}}, "weights.bits", "greater than or equal to 2, got 1"),
        ({"weights": {"bits": 9}}, "weights.bits", "less than or equal to 8, got 9"),
        ({"weights": {"bits": 4.5}}, "weights.bits", "got 4.5"),
        ({"activations": {"mode": "symetric"}}, "activations.mode", "Did you mean 'symmetric'?"),
        ({"initializer": {"range": {"num_init_samples": -1}}}, "initializer.range.num_init_samples", "got -1"),
        (
            {"initializer": {"range": {"type": "percentile", "params": {"max_percentile": 101}}}},
            "initializer.range.params.max_percentile",
            "less than or equal to 100, got 101",
        ),
        (
            {"initializer": {"range": [{"target_scope": "a"}]}},
            "initializer.range.0.target_scope",
            "Did you mean 'target_scopes'?",
        ),
        (
            {"initializer": {"precision": {"bitwidth_per_scope": [["a|WEIGHT", 4]]}}},
            "initializer.precision.bitwidth_per_scope.0",
            "must be a pair [bits, scope]",
        ),
        (
            {"scope_overrides": {"weights": {"Net/Conv2d[a]/conv2d_0": {"bit": 4}}}},
            "scope_overrides.weights.Net/Conv2d[a]/conv2d_0.bit",
            "Did you mean 'bits'?",
        ),
        ({"mode": "symmetric"}, "", 'belongs into "weights" or "activations"'),
        ({"params": {"weights_quant_start_epoch": -1}}, "params.weights_quant_start_epoch", "got -1"),
    ],
)
def test_wrong_values_are_named(values, path, words):
    with pytest.raises(ValidationError) as caught:
        section(**values)
    (problem,) = problems_of(caught.value, QuantizationConfig, "")
    assert problem.path == path
    assert words in problem.message


@pytest.mark.parametrize(
    "device, values, path, words",
    [
        ("CPU", {"weights": {"bits": 4}}, "weights.bits", 'offers for weights 8 bits symmetric'),
        ("ANY", {"activations": {"bits": 4}}, "activations.bits", '"TRIAL"'),
        ("NPU", {"weights": {"bits": 4, "mode": "asymmetric"}}, "weights.bits", "2 bits symmetric"),
        ("NPU", {"activations": {"bits": 2}}, "activations.bits", "4 bits symmetric per tensor"),
        (
            "CPU",
            {"scope_overrides": {"weights": {"fc": {"bits": 2}}}},
            "scope_overrides.weights.fc.bits",
            "bits 2",
        ),
        ("CPU", {"weights": {"signed": False}}, "weights.signed", "only has signed symmetric weights"),
        ("TRIAL", {"activations": {"mode": "asymmetric", "signed": True}}, "activations.signed", "asymmetric"),
        ("CPU", {"preset": "mixed", "activations": {"signed": True}}, "activations.signed", "asymmetric"),
        ("NPU", {"preset": "performance"}, "preset", "NPU has no presets"),
        (
            "CPU",
            {"preset": "mixed", "weights": {"mode": "symmetric"}, "activations": {"mode": "symmetric"}},
            "preset",
            "decides nothing",
        ),
        (
            "CPU",
            {"initializer": {"precision": {"type": "hawq", "bits": [4, 8], "iter_number": 100}}},
            "initializer.precision.type",
            "'hawq' is not available yet; choose the bits yourself",
        ),
        ("TRIAL", {"initializer": {"precision": {"type": "autoq"}}}, "initializer.precision.type", "'autoq'"),
        (
            "TRIAL",
            {"initializer": {"precision": {"bits": [4, 8], "bitwidth_per_scope": [[2, "a|WEIGHT"]]}}},
            "initializer.precision.bitwidth_per_scope.0",
            "not among initializer.precision.bits [4, 8]",
        ),
        (
            "CPU",
            {"initializer": {"precision": {"bitwidth_per_scope": [[4, "a|WEIGHT"]]}}},
            "initializer.precision.bitwidth_per_scope.0",
            "target_device CPU offers 8 bits",
        ),
        (
            "TRIAL",
            {"initializer": {"precision": {"bitwidth_per_scope": [[4, "a"]]}}},
            "initializer.precision.bitwidth_per_scope.0",
            "must end with |WEIGHT",
        ),
        (
            "TRIAL",
            {"initializer": {"precision": {"bitwidth_per_scope": [[4, "a|WEIGHT"], [8, "a|WEIGHT"]]}}},
            "initializer.precision.bitwidth_per_scope.1",
            "entry 0 already",
        ),
        ("CPU", {"initializer": {"range": []}}, "initializer.range", "empty list"),
        ("CPU", {"initializer": {"range": [{"type": "min_max"}]}}, "initializer.range.0", "target_scopes"),
        (
            "CPU",
            {"initializer": {"range": {"type": "percentile", "params": {"min_percentile": 99.9}}}},
            "initializer.range.params.min_percentile",
            "not below max_percentile",
        ),
        (
            "CPU",
            {"weights": {"ignored_scopes": ["a", "b"], "target_scopes": ["b"]}},
            "weights.target_scopes.0",
            "weights.ignored_scopes as well",
        ),
        ("CPU", {"ignored_scopes": "a", "target_scopes": "a"}, "target_scopes.0", "ignored_scopes as well"),
        ("CPU", {"weights": {"ignored_scopes": "{re}("}}, "weights.ignored_scopes.0", "not a regular expression"),
        ("CPU", {"scope_overrides": {"weights": {"fc": {}}}}, "scope_overrides.weights.fc", "says nothing"),
        ("CPU", {"activations": {"unified_scale_ops": [[]]}}, "activations.unified_scale_ops.0", "names no operator"),
        (
            "CPU",
            {"activations": {"unified_scale_ops": [["a", "b"], ["b", "c"]]}},
            "activations.unified_scale_ops.1",
            "'b' stands in group 0 too",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_before_there_is_a_model(device, values, path, words):
    found = problems(device, strict=False, **values)
    assert list(found) == [path]
    assert words in found[path]


@pytest.mark.parametrize(
    "device, values, path, words",
    [
        ("CPU", {"export_to_onnx_standard_ops": False}, "export_to_onnx_standard_ops", "QuantizeLinear"),
        ("GPU", {"overflow_fix": "enable"}, "overflow_fix", "no effect with target_device GPU"),
        (
            "CPU",
            {"initializer": {"range": {"type": "min_max", "params": {"min_percentile": 1.0}}}},
            "initializer.range.params.min_percentile",
            "only with percentiles",
        ),
        (
            "CPU",
            {"initializer": {"precision": {"tolerance": 0.1, "bitwidth_per_scope": [[8, "a|WEIGHT"]]}}},
            "initializer.precision.tolerance",
            "'manual'",
        ),
        ("CPU", {"initializer": {"precision": {"type": "manual"}}}, "initializer.precision", "bitwidth_per_scope"),
    ],
)
def test_values_without_effect_are_errors_with_a_reason_or_left_unread(device, values, path, words):
    found = problems(device, **values)
    assert list(found) == [path]
    assert words in found[path]
    config = section(**values)
    check_config(config, device, strict=False)
    if not path.startswith("initializer"):
        assert [leaf for leaf, _, read in config.given_leaves() if not read and leaf == path]


def test_all_problems_are_told_at_once():
    assert set(problems("NPU", preset="mixed", export_to_onnx_standard_ops=False, weights={"bits": 3})) == {
        "preset",
        "export_to_onnx_standard_ops",
        "weights.bits",
    }


def test_overflow_fix_disabled_where_there_is_nothing_to_fix_is_fine():
    check_config(section(overflow_fix="disable"), "GPU")


def test_sapphire_rapids_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"no quantization profile for the target_device 'CPU_SPR'.*\"CPU\""):
        check_config(section(), "CPU_SPR")


# Who wins.

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
    assert resolver.dead_entries() == []


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
    assert [problem.path for problem in resolver.dead_entries()] == [
        "weights.ignored_scopes.1",
        "scope_overrides.weights.absent",
        "initializer.precision.bitwidth_per_scope.0",
        "initializer.range.0.target_scopes.1",
    ]
    assert "'absent'" in resolver.dead_entries()[1].message


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
