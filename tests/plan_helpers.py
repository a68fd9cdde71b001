"""Models and configs for tests of plans."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from compress_core import (
    create_compressed_model,
    register_default_init_args,
)
from tests.sections import SECTIONS, sparsity
from tests.zoo import ZOO, trained_model

SPARSE = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}}
IMAGES = {"input_info": {"sample_size": [2, 3, 8, 8]}}
LEARNED = {
    "const": [{"algorithm": "const_sparsity"}],
    "rb": [{"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.4}}],
    "movement": [
        {
            "algorithm": "movement_sparsity",
            "params": {
                "warmup_start_epoch": 1,
                "warmup_end_epoch": 3,
                "importance_regularization_factor": 0.1,
                "enable_structured_masking": False,
            },
        }
    ],
    "distillation": [{"algorithm": "knowledge_distillation", "type": "mse"}, sparsity()],
}
ALL = {**SECTIONS, **LEARNED}


def cost(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def config_of(sections, inputs):
    """A config with data, for the creation."""
    config = {"target_device": "TRIAL", "compression": [*sections]}
    return register_default_init_args(config, [(inputs[0], torch.zeros(len(inputs[0])))])


def created(name, sections, epochs=0):
    """The stripped model of a creation; the schedule is followed for some epochs, without training."""
    model, inputs = trained_model(name), ZOO[name][1]()
    controller, model = create_compressed_model(model, config_of(sections, inputs))
    for _ in range(epochs):
        controller.scheduler.epoch_step()
    return controller, controller.strip()
