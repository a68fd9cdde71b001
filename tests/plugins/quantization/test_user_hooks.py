"""Forward hooks of users on a quantized model: its quantizers, their ranges and its outputs are those without hooks."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model
from tests.placement_helpers import Block, places, plan
from tests.zoo import ResidualNet, images

CONFIG = {"compression": {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResidualNet().eval()


class Watching:
    """Computes what the model computes, too, and calls modules of it."""

    def __init__(self, model):
        self.model, self.seen, self.is_inside = model, [], False

    def after(self, module, args, output):
        if self.is_inside or output.dim() != 4:
            return
        self.is_inside = True
        self.seen.append((F.relu(output) + output).abs().mean())
        if module is self.model.bn1:
            self.model.relu(self.model.bn2(self.model.conv2(5 * output)))
        self.is_inside = False


def watched(model):
    watching = Watching(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for module in [*layers, model.relu]:
        module.register_forward_hook(watching.after)
    return watching


@pytest.mark.parametrize("when", ["before", "after"])
def test_quantized_model_is_that_without_hooks(model, when, caplog):
    data = images(8)
    plain, hooked = copy.deepcopy(model), model
    if when == "before":
        watching = watched(hooked)
    wanted, _ = create_compressed_model(plain, CONFIG, init_loader=[data])
    found, _ = create_compressed_model(hooked, CONFIG, init_loader=[data])
    if when == "after":
        watching = watched(hooked)
        found.init_range()
    assert list(found.all_quantizations) == list(wanted.all_quantizations)
    for name, quantizer in wanted.all_quantizations.items():
        assert torch.equal(found.all_quantizations[name].scale, quantizer.scale), name
    watching.seen.clear()
    assert torch.equal(hooked(data), plain(data))
    assert watching.seen
    hooked.train()(data).sum().backward()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_a_hook_has_changed_is_quantized_where_it_is_read():
    block = Block(lambda m, x: m.b(m.relu(m.a(x))))
    assert places(plan(block, torch.ones(2, 4, 8, 8))) == [["model: input 0"], ["relu: output"]]
    block.relu.register_forward_hook(lambda m, i, o: torch.add(o, o))
    found = places(plan(block, torch.ones(2, 4, 8, 8)))
    assert found == [["model: input 0"], ["b: torch.nn.functional.conv2d#0 input 0"]]
