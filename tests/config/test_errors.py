"""Errors in a config: where, the value, the remedy, and all of them at once."""

import pytest

from compress_core import CompressionConfig, ConfigError
from tests.config.document_helpers import message, section


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"compresion": {}}, ["compresion: unknown key", "Did you mean 'compression'"]),
        ({"compression": "magnitude_sparsity"}, ["compression: must be an object or a list", "'magnitude_sparsity'"]),
        ({"compression": [3]}, ["compression.0: must be an object with a key 'algorithm', got 3"]),
        ({"compression": {"sparsity_init": 0.5}}, ["compression: 'algorithm' is required", "magnitude_sparsity"]),
        (
            {"compression": {"algorithm": "magnitude_sparsty"}},
            ["compression.algorithm:", "Did you mean 'magnitude_sparsity'?"],
        ),
        (
            {"compression": [{"algorithm": "magnitude_sparsity"}, {"algorithm": "magnitude_sparsity"}]},
            ["compression.1.magnitude_sparsity: this algorithm is named twice"],
        ),
        (
            {"compression": [{"algorithm": "magnitude_sparsity", "params": {"sparsity_targt": 0.5}}]},
            [
                "compression.0.magnitude_sparsity.params.sparsity_targt: unknown key (value 0.5)",
                "Did you mean 'sparsity_target'?",
            ],
        ),
        (
            section(initializer={"batchnorm_adaptation": {"num_bn_adaption_samples": 5}}),
            [
                "initializer.batchnorm_adaptation.num_bn_adaption_samples: unknown key (value 5)",
                "'num_bn_adaptation_samples'",
            ],
        ),
        (section(initializer={"batch_norm_adaptation": {}}), ["Did you mean 'batchnorm_adaptation'?"]),
        (
            section(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": -1}}),
            ["num_bn_adaptation_samples: input should be greater than or equal to 0, got -1"],
        ),
        (
            section(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 1.5}}),
            ["num_bn_adaptation_samples:", "integer", "1.5", "samples to adapt with"],
        ),
        (section(initializer={"batchnorm_adaptation": {"method": "pared"}}), ["method:", "Did you mean 'paired'?"]),
        (
            section(sparsity_init=1.0),
            ["compression.magnitude_sparsity.sparsity_init: input should be less than 1, got 1.0"],
        ),
        (section(sparsity_init="0.5"), ["sparsity_init:", "valid number", "'0.5'"]),
        (
            {**section(), "input_info": {"sample_size": [-1, 3, 8, 8]}},
            [
                "input_info.0.sample_size.0: input should be greater than or equal to 1, got -1",
                "batch dimension included",
            ],
        ),
        (section(params={"schedule": "polynominal"}), ["params.schedule:", "Did you mean 'polynomial'?"]),
        (section(params={"power": True}), ["params.power:", "True"]),
        (
            section(params={"multistep_sparsity_levels": [0.1, 2]}),
            ["params.multistep_sparsity_levels.1: input should be less than 1, got 2"],
        ),
        (
            section(
                params={"schedule": "multistep", "multistep_steps": [1, 2], "multistep_sparsity_levels": [0.1, 0.2]}
            ),
            ["compression.magnitude_sparsity.params.multistep_sparsity_levels: has 2 levels for 2 steps"],
        ),
        (
            section(sparsity_init=0.7, params={"sparsity_target": 0.5}),
            ["params.sparsity_target: sparsity_target 0.5 is below sparsity_init 0.7"],
        ),
        (section(params={"patience": 2}), ["params.patience: the value 2 can have no effect", "unused_values"]),
        (
            section(ignored_scopes=["conv9"]),
            ["ignored_scopes.0: the scope 'conv9' matches no layer", "Did you mean 'conv"],
        ),
        (section(target_scopes="{re}("), ["target_scopes.0: '{re}(' is not a regular expression"]),
        (
            section(ignored_scopes=["{re}."]),
            ["compression.magnitude_sparsity: finds nothing to compress: every weight is excluded"],
        ),
        (
            {**section(), "accuracy_aware_training": {}},
            ["accuracy_aware_training.mode: is required"],
        ),
        ({**section(), "target_device": "TPU"}, ["target_device:", "'TPU'"]),
        (
            {**section(), "input_info": {"sample_sise": [1]}},
            ["input_info.0.sample_sise: unknown key", "Did you mean 'sample_size'?"],
        ),
    ],
)
def test_error_names_path_value_and_remedy(config, parts):
    text = message(config)
    for part in parts:
        assert part in text, text


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        CompressionConfig.from_dict({**section(sparsity_init=2, params={"powr": 1}), "target_device": "x"})
    assert [problem.path for problem in caught.value.problems] == [
        "target_device",
        "compression.magnitude_sparsity.sparsity_init",
        "compression.magnitude_sparsity.params.powr",
    ]


def test_errors_below_a_key_name_the_key_whatever_it_looks_like(registry):
    from pydantic import BaseModel, ValidationError

    from compress_core.config.errors import problems_of

    class Leaf(BaseModel, extra="forbid"):
        bits: int = 8

    class Overrides(BaseModel):
        weights: dict[str, Leaf] = {}

    for scope in ("Model/Conv2d[conv]/conv2d_0", "{re}fc", "list", "bits"):
        with pytest.raises(ValidationError) as caught:
            Overrides.model_validate({"weights": {scope: {"bitz": 4}}})
        (problem,) = problems_of(caught.value, Overrides, "section")
        assert problem.path == f"section.weights.{scope}.bitz"
        assert problem.message == "unknown key (value 4). Did you mean 'bits'? Known here: bits."
