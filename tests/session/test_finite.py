"""A compressed model that returns NaN where the uncompressed one does not is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ModelError, create_compressed_model, register_default_init_args


class Divides(nn.Module):
    """Divides by activations of which some are too small for a grid of 8 bits."""

    def __init__(self, log=False):
        super().__init__()
        self.first, self.second, self.divisor, self.log = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), log

    def forward(self, x):
        divisor = self.divisor(x).abs()
        return torch.log(self.first(x) * 0) if self.log else self.second(self.first(x) * 0 / divisor)


def create(model, batch, **config):
    section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4, "type": "min_max"}}}
    config = {"compression": {**section, **config}}
    return create_compressed_model(model, register_default_init_args(config, [(batch, 0)]))


def model_and_batch():
    torch.manual_seed(0)
    model = Divides()
    with torch.no_grad():
        model.divisor.weight.copy_(torch.diag(torch.tensor([1e4, 1.0, 1.0, 1.0])))
        model.divisor.bias.zero_()
    return model, torch.ones(4, 4)


def test_nan_is_refused_with_the_place_where_it_begins():
    model, batch = model_and_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(
        ModelError,
        match=r"not finite on a batch.*uncompressed model does not.*what 'quantization' makes of 'model: torch.Tensor.div#0 output'",
    ):
        create(model, batch)
    assert model(batch).isfinite().all()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_returns_infinity_itself_is_accepted():
    controller, model = create(Divides(log=True), torch.ones(4, 4))
    assert not model(torch.ones(4, 4)).isfinite().any() and controller.statistics()


def test_the_remedy_of_the_message_works():
    model, batch = model_and_batch()
    _, model = create(model, batch, ignored_scopes=["divisor", "div", "{re}div"], validate_scopes=False)
    assert model.eval()(batch).isfinite().all()


def test_the_check_changes_nothing_in_the_model():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.norm(self.layer(x))

    model = Counts().train()
    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    create_compressed_model(model, register_default_init_args(config, [(torch.ones(4, 4), 0)]))
    assert model.calls == 0 and model.training and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("loader", [[], [{"other": torch.ones(2, 4)}], [(torch.ones(2, 3), 0)]])
def test_data_that_nobody_needs_is_not_checked(loader):
    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    controller, _ = create_compressed_model(Divides(), register_default_init_args(config, loader))
    assert controller.statistics()


def test_a_loader_that_fails_is_not_checked():
    class Broken:
        def __iter__(self):
            raise KeyError("no such file")

    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    controller, _ = create_compressed_model(Divides(), register_default_init_args(config, Broken()))
    assert controller.statistics()
