"""The filter importance `reconstruction`, and its life after the model has been created."""

import copy
import json

import pytest
import torch
from torch import nn

from compress_core import DataError, create_compressed_model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 4, generator=generator) + 1 for _ in range(8)]


def compressed(model, data, level=0.4, **kwargs):
    params = {"filter_importance": "reconstruction", "multiple_of": 1, "schedule": "baseline"}
    config = {
        "target_device": "TRIAL",
        "input_info": {"sample_size": [1, 4]},
        "compression": {"algorithm": "filter_pruning", "pruning_init": level, "params": params},
    }
    return create_compressed_model(model, config, init_loader=data, **kwargs)


def test_importance_is_the_rise_of_the_readers_error_when_the_others_make_up_for_a_channel():
    model = network().double()
    model[0] = nn.Sequential(nn.Linear(4, 6).double(), nn.ReLU())
    data = [batch.double() for batch in batches()]
    controller, _ = compressed(copy.deepcopy(model), data)
    with torch.no_grad():
        inputs = model[0](torch.cat(data))
    weight, gram = model[1].weight.detach(), inputs.T @ inputs / len(inputs)
    diagonal = gram.diagonal()
    damped = gram + torch.diag(0.1 * (diagonal + diagonal.mean() / 10))
    expected = []
    for channel in range(6):
        others = [index for index in range(6) if index != channel]
        # Least squares of what is lost, held at the old weights: minimizes d A d' with d = -w in the removed column.
        root = torch.linalg.cholesky(damped).T
        made_up = torch.linalg.lstsq(root[:, others], root[:, [channel]] @ weight[:, [channel]].T).solution
        lost = root[:, [channel]] @ weight[:, [channel]].T - root[:, others] @ made_up
        expected.append(float(lost.square().sum()))
    (measured,) = controller.get_compression_state()["algorithms"]["filter_pruning"]["state"]["measured"]
    assert measured == pytest.approx(expected, rel=1e-4)


def test_a_resumed_model_masks_the_same_channels_without_data():
    controller, model = compressed(network(), batches())
    state = json.loads(json.dumps(controller.get_compression_state()))
    again, other = compressed(network(), None, compression_state=state)
    other.load_state_dict(model.state_dict())
    controller.set_pruning_level(0.7)
    again.set_pruning_level(0.7)
    for left, right in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_weights_that_change_do_not_change_the_masks():
    controller, model = compressed(network(), batches())
    before = controller.get_compression_state()["algorithms"]["filter_pruning"]["state"]["gone"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    controller.set_pruning_level(0.4)
    assert controller.get_compression_state()["algorithms"]["filter_pruning"]["state"]["gone"] == before


def test_without_data_it_is_refused_with_the_path():
    with pytest.raises(DataError, match=r"compression\.filter_pruning\.params\.filter_importance: needs calibration"):
        compressed(network(), None)


class Readers(nn.Module):
    """One layer that is measured, and three more readers: one scaled, one never reached by data, one half reached."""

    def __init__(self):
        super().__init__()
        self.makes, self.seen, self.never, self.scaled = (nn.Linear(*size) for size in [(4, 6), (6, 2), (6, 2), (6, 2)])
        self.rows = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        x = self.makes(x)
        y = self.seen(x) + x @ (2 * self.scaled.weight).t() + nn.functional.linear(x, self.rows[:2])
        return y + self.never(x) + nn.functional.linear(x, self.rows[2:]) if len(x) == 1 else y


def test_readers_that_do_not_count_are_named_with_the_reason(caplog):
    torch.manual_seed(0)
    compressed(Readers(), batches())
    found = [record.getMessage() for record in caplog.records if "not counted in full" in record.getMessage()]
    assert len(found) == 3
    assert all(line.startswith("compression.filter_pruning.params.filter_importance: ") for line in found)
    reasons = {line.split("'")[1]: line for line in found}
    assert "no product with it was seen" in reasons["never.weight"]
    assert "parts of it were in no product" in reasons["rows"]
    assert "mul" in reasons["scaled.weight"]


class TiedTokens(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x)
        return self.head(x + self.inner(x))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_an_embedding_is_named(tied, caplog):
    torch.manual_seed(0)
    params = {"filter_importance": "reconstruction", "multiple_of": 1, "schedule": "baseline"}
    config = {
        "input_info": {"sample_size": [1, 5], "type": "long"},
        "compression": {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": params},
    }
    create_compressed_model(TiedTokens(tied), config, init_loader=[torch.arange(5).repeat(8, 1)])
    found = [record.getMessage() for record in caplog.records if "not counted in full" in record.getMessage()]
    assert ["tokens.weight" in line and "embedding" in line for line in found] == [True] * tied


def test_the_first_epoch_keeps_masks_that_reconstruction_has_fitted_the_weights_to():
    params = {"schedule": "baseline", "num_init_steps": 0, "multiple_of": 1, "pruning_target": 0.5}
    section = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": params}
    section["initializer"] = {"weight_reconstruction": {"num_samples": 128}}
    config = {"target_device": "TRIAL", "input_info": {"sample_size": [1, 4]}, "compression": section}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    controller, model = create_compressed_model(model, config, init_loader=batches())
    x = torch.cat(batches())
    expected = model(x)
    controller.scheduler.epoch_step()
    assert torch.equal(model(x), expected)
