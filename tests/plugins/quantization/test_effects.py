"""What the ledger says about the values of a section: each for itself, and nothing of what has only been checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_quantization.effects import applied_to


def create(unused="error", **section):
    section = {"algorithm": "quantization", **section}
    document = {"input_info": {"sample_size": [2, 4]}, "unused_values": unused, "compression": section}
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    controller, _ = create_compressed_model(model, document, init_loader=[torch.randn(4, 4)])
    prefix = "compression.quantization."
    return {e.path.removeprefix(prefix): (e.effect, e.modules) for e in controller.ledger if e.path.startswith(prefix)}


APPLIES, NOTHING = "applies to these quantizers", "matches nothing in this model"


def test_each_entry_of_a_list_has_its_own_quantizers():
    found = create(
        initializer={
            "range": [
                {"type": "min_max", "target_scopes": ["0"]},
                {"type": "threesigma", "ignored_scopes": ["0", "nowhere"], "validate_scopes": False},
            ],
            "precision": {"bitwidth_per_scope": [[8, "0|WEIGHT"], [8, "2|WEIGHT"]]},
        },
    )
    first, second = ("0|WEIGHT", "model/input 0|OUTPUT"), ("2|WEIGHT", "1|OUTPUT")
    assert found["initializer.range.0.type"] == (APPLIES, first)
    assert found["initializer.range.0.target_scopes"] == (APPLIES, first)
    assert found["initializer.range.1.type"] == (APPLIES, second)
    for index, name in enumerate(("0|WEIGHT", "2|WEIGHT")):
        assert found[f"initializer.precision.bitwidth_per_scope.{index}"] == (APPLIES, (name,))


def test_an_entry_that_no_quantizer_takes_is_refused():
    ranges = [{"type": "min_max", "ignored_scopes": []}, {"type": "threesigma", "ignored_scopes": ["0", "2", "1"]}]
    with pytest.raises(ConfigError, match=r"range\.1\.type: the value 'threesigma' can have no effect"):
        create(initializer={"range": ranges})


def test_values_that_have_only_been_checked_are_told_with_a_warning(caplog):
    params = {"type": "min_max", "params": {"min_percentile": 1.0}}
    found = create("warn", scope_overrides={"weights": {"0": {"initializer": {"range": params}}}})
    assert found["scope_overrides.weights.0.initializer.range.type"] == (APPLIES, ("0|WEIGHT",))
    assert found["scope_overrides.weights.0.initializer.range.params.min_percentile"] == ("no effect", ())
    assert "min_percentile" in caplog.text


def test_scopes_that_need_not_match_are_no_error_and_are_told():
    found = create(
        validate_scopes=False,
        weights={"ignored_scopes": ["nowhere"], "validate_scopes": False},
        activations={"unified_scale_ops": [["0", "2"], ["nowhere"]], "validate_scopes": False},
        scope_overrides={"weights": {"0": {"bits": 8}, "nowhere": {"bits": 8}}},
    )
    assert found["scope_overrides.weights.0.bits"] == (APPLIES, ("0|WEIGHT",))
    assert found["scope_overrides.weights.nowhere.bits"] == (NOTHING, ())
    assert found["weights.ignored_scopes"] == (NOTHING, ())
    assert found["activations.unified_scale_ops.0"][1] == ("model/input 0|OUTPUT", "1|OUTPUT")
    assert found["activations.unified_scale_ops.1"] == (NOTHING, ())


def test_of_scopes_with_dots_in_them_the_longest_is_meant():
    entries = {
        "weights.a": ["a.b|WEIGHT", "a.c|WEIGHT"],
        "weights.a.b": ["a.b|WEIGHT"],
        "weights.x.0": [],
        "weights.x.1": ["y"],
    }
    assert applied_to("weights.a.bits", entries) == ["a.b|WEIGHT", "a.c|WEIGHT"]
    assert applied_to("weights.a.b.bits", entries) == ["a.b|WEIGHT"]
    assert applied_to("weights.x", entries) == ["y"]
    assert applied_to("weights.x.0", entries) == []
    assert applied_to("preset", entries) is None
