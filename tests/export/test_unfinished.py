"""`controller.export` says so if the model is not compressed as far as its config asks for."""

import logging

import torch
from torch import nn

from compress_core import create_compressed_model

WORDS = "is compressed less than the config asks for: magnitude_sparsity is uncompressed"


def test_a_schedule_that_has_not_ended(tmp_path, caplog):
    found = exported(tmp_path, caplog, 0)
    assert WORDS in found and "Train until the schedule ends, or let it end earlier." in found
    assert WORDS not in exported(tmp_path, caplog, 2)


def test_a_level_that_accuracy_aware_training_searches_is_no_shortfall(tmp_path, caplog):
    parameters = {"maximal_total_epochs": 4, "initial_training_phase_epochs": 1, "patience_epochs": 1}
    section = {"mode": "adaptive_compression_level", "params": parameters}
    section["params"]["maximal_absolute_accuracy_degradation"] = 1
    assert WORDS not in exported(tmp_path, caplog, 0, accuracy_aware_training=section)


def exported(folder, caplog, epochs, **more):
    """Returns what is logged when a model is exported after so many epochs of two."""
    section = {"algorithm": "magnitude_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 1}}
    config = {"compression": section, "input_info": {"sample_size": [2, 4]}, **more}
    controller, _ = create_compressed_model(nn.Linear(4, 4), config)
    for _ in range(epochs):
        controller.scheduler.epoch_step()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        controller.export(folder / "model.onnx", torch.rand(2, 4))
    return caplog.text
