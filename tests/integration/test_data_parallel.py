"""DataParallel: computes as the model itself where it makes no copies, and is refused in words where it would."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ModelError, create_compressed_model
from compress_core.torch_internals import replica_override

SPARSE = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}}


def test_without_several_devices_it_is_the_model():
    controller, model = create_compressed_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), SPARSE)
    parallel, x = nn.DataParallel(model), torch.ones(2, 4)
    assert torch.equal(parallel(x), model(x))
    parallel(x).sum().backward()
    assert model[0].weight.grad is not None
    controller.scheduler.epoch_step()


def test_copies_for_several_devices_are_refused():
    _, model = create_compressed_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), SPARSE)
    (copy_of_layer,) = replica_override(None)
    with pytest.raises(ModelError, match=r"DataParallel copies the model .* one process for each GPU"):
        getattr(model[0], copy_of_layer)()


def test_a_part_of_the_model_that_is_wrapped_is_refused():
    model = nn.Sequential(nn.DataParallel(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"the module '0' is wrapped in DataParallel, .* without the wrapper"):
        create_compressed_model(model, SPARSE)
