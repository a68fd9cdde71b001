import json
import logging
from pathlib import Path

import pytest
import torch
from pydantic import Field

from compress_core import (
    BNAdaptationInitArgs,
    CompressionConfig,
    ConfigError,
    DataError,
    Section,
    check_config,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.__main__ import main
from compress_core.registry.schema import json_schema
from tests.zoo import ResidualNet, images

# The two documents of NNCF's documentation, byte for byte.
DOCUMENTED = Path(__file__).resolve().parent.parent / "data"
SPARSITY = DOCUMENTED / "magnitude_sparsity_bn_adaptation.json"
QUANTIZATION = DOCUMENTED / "quantization_bn_adaptation.json"


def section(**values):
    return {"compression": {"algorithm": "magnitude_sparsity", **values}}


def loader(batches=4):
    return [(images(8), torch.zeros(8)) for _ in range(batches)]


def message(config):
    with pytest.raises(ConfigError) as caught:
        create_compressed_model(ResidualNet(), config, init_loader=loader())
    return str(caught.value)


def test_documented_sparsity_config_runs_as_it_is():
    config = register_default_init_args(SPARSITY, loader())
    controller, _ = create_compressed_model(ResidualNet(), config)
    report = controller.statistics().batchnorm_adaptation.to_dict()
    assert (report["requested_samples"], report["samples"], report["batches"]) == (32, 32, 4)
    for _ in range(11):
        controller.scheduler.epoch_step()
    assert controller.compression_rate == pytest.approx(0.5, abs=1e-3)


def test_documented_quantization_config_runs_as_it_is():
    config = register_default_init_args(QUANTIZATION, loader())
    assert config.root.input_info[0].sample_size == [1, 3, 224, 224]
    controller, model = create_compressed_model(ResidualNet(), config)
    report = controller.statistics().batchnorm_adaptation.to_dict()
    assert (report["requested_samples"], report["samples"]) == (2048, 32)
    weights, activations = len(controller.weight_quantizers), len(controller.non_weight_quantizers)
    assert (weights, activations) == (3, 6)
    assert model(images(2)).isfinite().all()


def test_a_document_of_an_algorithm_that_is_not_installed_loads_and_says_what_is_missing():
    config = CompressionConfig.from_dict({"compression": {"algorithm": "knowledge_distillation", "params": {}}})
    assert [section.algorithm for section in config.sections] == ["knowledge_distillation"]
    text = message(config)
    assert text.startswith("compression.algorithm: the algorithm 'knowledge_distillation' is not installed")
    assert "Installed: filter_pruning, magnitude_sparsity, quantization." in text


@pytest.mark.parametrize("give", ["register", "struct", "init_loader"])
def test_three_ways_to_give_data_are_the_same(give):
    document, data = json.loads(json.dumps(CompressionConfig.from_json(SPARSITY).source)), loader()
    document["compression"]["sparsity_init"] = 0.5
    model, keywords = ResidualNet(), {}
    model.load_state_dict(torch.load(_saved_model(), weights_only=True))
    if give == "register":
        document = register_default_init_args(document, data)
    elif give == "struct":
        document = CompressionConfig.from_dict(document).register_extra_structs([BNAdaptationInitArgs(data)])
    else:
        keywords["init_loader"] = data
    create_compressed_model(model, document, **keywords)
    expected = ResidualNet()
    expected.load_state_dict(torch.load(_saved_model(), weights_only=True))
    create_compressed_model(
        expected,
        section(sparsity_init=0.5, initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 32}}),
        init_loader=data,
    )
    assert torch.equal(model.bn2.running_var, expected.bn2.running_var)


def _saved_model():
    import io

    torch.manual_seed(3)
    buffer = io.BytesIO()
    torch.save(ResidualNet().state_dict(), buffer)
    buffer.seek(0)
    return buffer


def test_missing_data_is_an_error_before_anything_is_touched():
    with pytest.raises(DataError) as caught:
        create_compressed_model(ResidualNet(), SPARSITY)
    text = str(caught.value)
    assert text.startswith("compression.magnitude_sparsity.initializer.batchnorm_adaptation: needs calibration data")
    assert "register_default_init_args(config, loader)" in text
    assert "init_loader=" in text


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
        (section(sparsity_init=0.7), ["params.sparsity_target: sparsity_target 0.5 is below sparsity_init 0.7"]),
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
            ["accuracy_aware_training: accuracy-aware training is not available"],
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


def test_unknown_root_keys_are_named_once_and_left_to_the_user(caplog):
    with caplog.at_level(logging.WARNING):
        CompressionConfig.from_dict({"model": "resnet18", "epochs": 3, "batch_size": 4, **section()})
    assert [r.message for r in caplog.records] == [
        "config: compress-core does not use the top-level keys model, epochs, batch_size; they are left to your program"
    ]


def test_value_without_effect_can_be_a_warning(caplog):
    create_compressed_model(ResidualNet(), {"unused_values": "warn", **section(params={"patience": 2})})
    assert sum("params.patience: the value 2 can have no effect" in record.message for record in caplog.records) == 1


def test_whole_floats_are_whole_numbers():
    config = section(params={"sparsity_target_epoch": 10.0})
    assert CompressionConfig.from_dict(config).sections[0].params.sparsity_target_epoch == 10


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"compression": {"algorithm": "magnitude_sparsity",}, // comment\n /* and */ }', None),
        ('{"compression": ', "is not JSON"),
        ('{"log_dir": "a", "log_dir": "b"}', "Duplicate key"),
        ("[]", "a config is an object"),
    ],
)
def test_files(tmp_path, text, part):
    path = tmp_path / "config.json"
    path.write_text(text)
    if part is None:
        assert len(CompressionConfig.from_json(path).sections) == 1
    else:
        with pytest.raises(ConfigError, match=part):
            CompressionConfig.from_json(path)


def test_missing_file_and_directory_are_config_errors(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the config"):
            CompressionConfig.from_json(path)


def test_loading_does_not_change_or_keep_the_users_dict():
    document = section(ignored_scopes="conv1")
    before = json.dumps(document)
    config = CompressionConfig.from_dict(document)
    create_compressed_model(ResidualNet(), config)
    create_compressed_model(ResidualNet(), config)
    assert json.dumps(document) == before
    document["compression"]["ignored_scopes"] = "fc"
    assert config.sections[0].ignored_scopes == ["conv1"]


def test_sections_are_frozen():
    config = CompressionConfig.from_dict(section())
    with pytest.raises(ValueError, match="frozen"):
        config.sections[0].sparsity_init = 0.9


def test_ledger_tells_for_each_value_what_it_did():
    config = section(ignored_scopes=["{re}fc"], sparsity_init=0.25) | {"input_info": {"sample_size": [1, 3, 8, 8]}}
    controller, _ = create_compressed_model(ResidualNet(), config)
    entry = controller.ledger["compression.magnitude_sparsity.sparsity_init"]
    assert entry.modules == ("conv1.weight", "conv2.weight")
    assert controller.ledger["compression.magnitude_sparsity.ignored_scopes.0"].modules == ("fc",)
    assert controller.ledger["input_info.0.sample_size"].effect == "no algorithm of this config uses it"
    assert json.loads(json.dumps(controller.statistics().to_dict()))["ledger"]["input_info.0.sample_size"]["value"] == [
        1,
        3,
        8,
        8,
    ]
    assert "compression.magnitude_sparsity.sparsity_init" in controller.statistics().to_str()


def test_config_without_algorithm_leaves_the_model_alone(caplog):
    model = ResidualNet()
    controller, _ = create_compressed_model(model, {})
    assert "names no algorithm" in caplog.text
    assert controller.loss().item() == 0
    assert controller.compression_rate == 0
    assert len(model.state_dict()) == len(ResidualNet().state_dict())


def test_schema_describes_everything_and_accepts_the_documented_config(registry):
    schema = json_schema(registry)
    definitions = schema["$defs"]
    assert set(definitions) >= {
        "MagnitudeSparsityConfig",
        "MagnitudeSparsityParams",
        "BatchNormAdaptationConfig",
        "InputInfo",
    }
    for name, definition in {"root": schema, **definitions}.items():
        for key, entry in definition.get("properties", {}).items():
            assert entry.get("description"), f"{name}.{key} has no description"
    import jsonschema

    jsonschema.validate(CompressionConfig.from_json(SPARSITY).source, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(section(params={"sparsity_targt": 1}), schema)


def test_check_config_without_a_model():
    check_config(SPARSITY)
    with pytest.raises(ConfigError, match="multistep_sparsity_levels"):
        check_config(section(params={"schedule": "multistep", "multistep_steps": [1, 2, 3]}))


@pytest.mark.parametrize(
    ("file", "status", "part"),
    [(SPARSITY, 0, "valid"), (QUANTIZATION, 0, "valid"), (Path("none.json"), 1, "cannot read")],
)
def test_command_check(file, status, part, capsys):
    assert main(["check", str(file)]) == status
    captured = capsys.readouterr()
    assert part in captured.out + captured.err


def test_command_algorithms_and_schema(capsys, registry):
    assert main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert "magnitude_sparsity" in out
    assert "batchnorm_adaptation" in out
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(registry)


def test_command_algorithms_tells_of_broken_plugins(capsys, registry):
    import importlib.metadata

    registry.load_entry_points([importlib.metadata.EntryPoint("broken", "no_such_module", "compress_core.plugins")])
    assert main(["algorithms"]) == 1
    assert "broken could not be loaded: ModuleNotFoundError" in capsys.readouterr().err


def test_command_whose_reader_stops_reading():
    import subprocess
    import sys

    from tests.conftest import ROOT

    command = f"{sys.executable} -m compress_core schema | head -1; exit ${{PIPESTATUS[0]}}"
    paths = f"{ROOT}:{ROOT}/plugins/magnitude_sparsity"
    result = subprocess.run(
        ["bash", "-c", command],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "{\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_path_that_no_file_can_have():
    with pytest.raises(ConfigError, match="cannot read the config"):
        CompressionConfig.from_json("\0")


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


# What has been read.


class Item(Section):
    size: int = 1
    name: str = ""


class Whole(Section):
    items: list[Item] = Field(default_factory=list)
    named: dict[str, Item] = Field(default_factory=dict)
    pairs: list[tuple[int, str]] = Field(default_factory=list)
    groups: list[list[str]] = Field(default_factory=list)
    plain: list[int] = Field(default_factory=list)
    one: Item = Item()


WHOLE = {
    "items": [{"size": 2, "name": "a"}, {"size": 3}],
    "named": {"x": {"size": 4}, "y.z": {"name": "b"}},
    "pairs": [(4, "a"), (8, "b")],
    "groups": [["a", "b"], ["c"]],
    "plain": [1, 2],
    "one": {"size": 5},
}


def read_leaves(section):
    return {leaf for leaf, _, read in section.given_leaves() if read}


def test_leaves_in_lists_and_dicts_are_told_apart():
    whole = Whole.model_validate(WHOLE)
    assert {leaf: value for leaf, value, _ in whole.given_leaves()} == {
        "items.0.size": 2,
        "items.0.name": "a",
        "items.1.size": 3,
        "named.x.size": 4,
        "named.y.z.name": "b",
        "pairs.0": (4, "a"),
        "pairs.1": (8, "b"),
        "groups.0": ["a", "b"],
        "groups.1": ["c"],
        "plain": [1, 2],
        "one.size": 5,
    }
    assert whole.items[1].size == 3
    assert whole.named["y.z"].name == "b"
    assert read_leaves(whole) == {"items.1.size", "named.y.z.name"}


def test_looking_at_a_copy_leaves_no_trace_on_the_section():
    whole = Whole.model_validate(WHOLE)
    _ = whole.plain, whole.items[0].size
    copy = whole.unread()
    assert read_leaves(copy) == set()
    for item in (*copy.items, *copy.named.values(), copy.one):
        _ = item.size, item.name
    _ = copy.pairs, copy.groups, copy.plain
    assert read_leaves(copy) == {leaf for leaf, _, _ in whole.given_leaves()}
    assert read_leaves(whole) == {"plain", "items.0.size"}
    assert copy.model_dump() == whole.model_dump()
