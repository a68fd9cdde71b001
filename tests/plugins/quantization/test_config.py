"""The section is checked."""

import pytest
from pydantic import ValidationError

from compress_core import ConfigError
from compress_core.config.errors import problems_of
from compress_quantization.config import QuantizationConfig, RangeParams
from compress_quantization.config_checks import check_config
from compress_quantization.plan import InitialRange
from compress_quantization.profiles import load_profile
from compress_quantization.quantizer_config import (
    Resolver,
    check_strict_bits,
)
from tests.plugins.quantization.config_helpers import place, section


def problems(device="CPU", *, strict=True, **values):
    with pytest.raises(ConfigError) as caught:
        check_config(section(**values), device, strict=strict)
    return {problem.path: problem.message for problem in caught.value.problems}


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
        ({"mode": "symmetric"}, "", 'belongs in "weights" or "activations"'),
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
            {"initializer": {"precision": {"type": "sensitivity", "bits": [4, 8], "budget": {"average_bits": 6}}}},
            "initializer.precision",
            "there is nothing to choose: target_device CPU offers [8] bits",
        ),
        (
            "TRIAL",
            {"initializer": {"precision": {"type": "sensitivity"}}},
            "initializer.precision.budget",
            "is required",
        ),
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
            {"initializer": {"range": {"type": "percentile", "params": {"min_percentile": 99.9, "max_percentile": 9}}}},
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"min_percentile": 99.95}, (99.95, 100)),
        ({"max_percentile": 0.05}, (0, 0.05)),
        ({"min_percentile": 2}, (2, 99.9)),
    ],
)
def test_a_percentile_that_nobody_gave_leaves_a_range(given, expected):
    params = RangeParams(**given)
    assert (params.min_percentile, params.max_percentile) == expected
    assert params.model_fields_set == set(given)
