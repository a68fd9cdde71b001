"""Documents of the config: NNCF's run as they are, from wherever they come."""

import json
import logging

import pytest
import torch

from compress_core import (
    BNAdaptationInitArgs,
    CompressionConfig,
    ConfigError,
    DataError,
    check_config,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.registry.schema import json_schema
from tests.config.document_helpers import QUANTIZATION, SPARSITY, loader, message, section
from tests.zoo import ResidualNet, images


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
    assert "filter_pruning, magnitude_sparsity, movement_sparsity, quantization, rb_sparsity." in text


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


def test_path_that_no_file_can_have():
    with pytest.raises(ConfigError, match="cannot read the config"):
        CompressionConfig.from_json("\0")
