"""Copies and pickles of a model and its controller: a copy of the controller drives the copy of the model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress_core import DataError, create_compressed_model, hookimpl, register_default_init_args
from tests.plugin_helpers import algorithm, contributing
from tests.zoo import ResidualNet, images

DATA = [(images(), 0)]
SECTIONS = {
    "quantization": {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}}},
    "sparsity": {
        "algorithm": "magnitude_sparsity", "sparsity_init": 0.2,
        "params": {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.2, 0.6]},
    },
    "pruning": {
        "algorithm": "filter_pruning", "pruning_init": 0.3, "params": {"prune_first_conv": True, "multiple_of": 2}
    },
}  # fmt: skip


class Holder(nn.Module):
    """As a LightningModule: holds the model and its controller."""

    def __init__(self, *sections):
        super().__init__()
        config = register_default_init_args({"compression": [SECTIONS[name] for name in sections]}, DATA)
        self.controller, self.model = create_compressed_model(ResidualNet(), config)

    def forward(self, x):
        return self.model(x)


def train(holder):
    holder.controller.scheduler.epoch_step()
    holder.controller.scheduler.step()
    holder.controller.scheduler.epoch_step()
    (holder(images()).square().mean() + holder.controller.loss()).backward()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda holder: pickle.loads(pickle.dumps(holder)),
    "average": lambda holder: AveragedModel(holder).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("sections", [(name,) for name in SECTIONS] + [tuple(reversed(SECTIONS))], ids="+".join)
def test_the_copy_of_the_controller_drives_the_copy_of_the_model(sections, how):
    original = Holder(*sections)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    state = original.controller.get_compression_state()
    twin = COPIES[how](original)
    assert twin.controller.model is twin.model is not original.model
    assert torch.equal(twin.eval()(images()), original.eval()(images()))
    assert twin.controller.get_compression_state() == state
    train(twin.train())
    assert twin.controller.scheduler.current_epoch == 1
    assert original.controller.scheduler.current_epoch == -1
    if "sparsity" in sections:
        assert twin.controller.sparsity_level == pytest.approx(0.6, abs=0.01)
        assert original.controller.sparsity_level == pytest.approx(0.2, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert original.controller.get_compression_state() == state
    twin.eval()
    plain = twin.controller.strip()
    torch.testing.assert_close(plain.eval()(images()), twin(images()), rtol=1e-3, atol=1e-3)
    assert str(twin.controller.statistics())


def test_a_copy_shares_the_data_and_a_pickle_has_none():
    original = Holder("quantization")
    twin = copy.deepcopy(original)
    twin.controller.init_range()
    assert twin.controller.context.config is original.controller.context.config
    loaded = pickle.loads(pickle.dumps(original))
    with pytest.raises(DataError, match="register_default_init_args"):
        loaded.controller.init_range()
    loaded.controller.adapt_batchnorm(DATA)


def test_loss_of_the_copy_is_that_of_its_own_forward(registry):
    def loss(self, batch):
        return batch.outputs.square().mean()

    members = {
        "compress_plan": hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        "compress_loss": hookimpl(loss),
        "needs_batch": True,
    }
    registry.register(contributing(algorithm(**members)), "demo")
    holder = nn.Module()
    holder.controller, holder.model = create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine"}})
    holder.model(images())
    twin = copy.deepcopy(holder)
    outputs = twin.model(2 * images())
    assert twin.controller.loss().item() == pytest.approx(outputs.square().mean().item())
    assert holder.controller.loss().item() != pytest.approx(outputs.square().mean().item())
