"""Documents as NNCF's users have them: one small one for each kind of key, checked, created, trained and stripped."""

import json
import logging

import pytest
import torch

from compress_core import ConfigError, check_config
from compress_core.config import CompressionConfig
from compress_core.nncf import NNCFConfig, create_compressed_model, register_default_init_args
from tests.accuracy_aware.loops_helpers import IMAGES, LABELS, Net

SCRIPT = {
    "model": "resnet18",
    "pretrained": True,
    "batch_size": 256,
    "epochs": 100,
    "optimizer": {"type": "SGD", "base_lr": 1e-5, "weight_decay": 1e-4, "schedule_type": "multistep", "steps": [20]},
    "dataset": "imagenet",
    "num_classes": 1000,
    "multiprocessing_distributed": True,
}
KINDS = {
    "keys of the script": {**SCRIPT, "compression": {"algorithm": "magnitude_sparsity"}},
    "no compression": {**SCRIPT},
    "an empty list": {"compression": []},
    "keys for staged workers": {
        "compression": {
            "algorithm": "quantization",
            "params": {
                "activations_quant_start_epoch": 1,
                "weights_quant_start_epoch": 2,
                "batch_multiplier": 4,
                "lr_poly_drop_start_epoch": 20,
                "lr_poly_drop_duration_epochs": 10,
                "disable_wd_start_epoch": 20,
                "base_lr": 3.1e-4,
                "base_wd": 1e-5,
            },
        }
    },
    "root scopes": {
        "ignored_scopes": ["Net/NNCFLinear[fc]/linear_0"],
        "target_scopes": ["{re}conv.*", "{re}fc"],
        "compression": {"algorithm": "magnitude_sparsity"},
    },
    "keys without meaning": {
        "log_dir": "runs",
        "disable_shape_matching": True,
        "scopes_without_shape_matching": ["Net"],
        "compression": {"algorithm": "quantization"},
    },
    "whole numbers as floats": {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "params": {"sparsity_target_epoch": 3.0, "sparsity_freeze_epoch": 5.0},
        }
    },
    "early exit": {
        "accuracy_aware_training": {
            "mode": "early_exit",
            "params": {"maximal_relative_accuracy_degradation": 1.0, "maximal_total_epochs": 100},
        },
        "compression": {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}},
    },
    "adaptive": {
        "accuracy_aware_training": {
            "mode": "adaptive_compression_level",
            "params": {
                "maximal_absolute_accuracy_degradation": 1,
                "initial_training_phase_epochs": 0,
                "patience_epochs": 1,
            },
        },
        "compression": [
            {
                "algorithm": "filter_pruning",
                "pruning_init": 0.1,
                "params": {
                    "schedule": "exponential",
                    "pruning_target": 0.6,
                    "pruning_steps": 15,
                    "prune_first_conv": True,
                },
            },
            {"algorithm": "quantization", "compression_lr_multiplier": 0.5},
        ],
    },
    "a single line": {"compression": {"algorithm": "magnitude_sparsity"}},
    "old spelling": {"input_infos": {"sample_size": [1, 3, 8, 8]}, "compression": {"algorithm": "quantization"}},
    "several inputs": {
        "input_info": [{"sample_size": [1, 3, 8, 8], "type": "float", "filler": "random", "keyword": "x"}],
        "compression": {"algorithm": "quantization"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_every_kind_run(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {"input_info": {"sample_size": [1, 3, 8, 8]}, **KINDS[kind]}
            if "infos" not in str(KINDS[kind])
            else KINDS[kind]
        )
    )
    check_config(path)
    config = register_default_init_args(NNCFConfig.from_json(path), [(IMAGES, LABELS)])
    torch.manual_seed(0)
    controller, model = create_compressed_model(Net(), config)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    controller.scheduler.epoch_step()
    for _ in range(2):
        controller.scheduler.step()
        (torch.nn.functional.cross_entropy(model(IMAGES), LABELS) + controller.loss()).backward()
        optimizer.step()
    state = json.loads(json.dumps(controller.get_compression_state()))
    again, twin = create_compressed_model(Net(), config, state)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(IMAGES), model.eval()(IMAGES))
    assert controller.strip()(IMAGES).shape == (8, 4)
    assert again.scheduler.current_step == 1


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("keys for staged workers", ["batch_multiplier", "lr_poly_drop_start_epoch", "base_lr", "base_wd"]),
        ("keys of the script", ["model", "epochs", "optimizer", "multiprocessing_distributed"]),
        ("keys without meaning", ["log_dir", "disable_shape_matching", "scopes_without_shape_matching"]),
        ("old spelling", ["'input_infos' is read as 'input_info'"]),
    ],
)
def test_keys_that_mean_nothing_are_named_once(caplog, kind, names):
    caplog.set_level(logging.WARNING)
    check_config(KINDS[kind])
    for name in names:
        assert caplog.text.count(name) >= 1
    assert len([record for record in caplog.records if names[0] in record.getMessage()]) == 1


def test_an_old_spelling_beside_the_new_one_is_refused():
    with pytest.raises(ConfigError, match="input_infos: is an old spelling"):
        CompressionConfig.from_dict({"input_infos": [], "input_info": [], "compression": []})


def test_architecture_search_is_refused():
    with pytest.raises(ConfigError, match="bootstrapNAS"):
        check_config({"bootstrapNAS": {}, "compression": []})
