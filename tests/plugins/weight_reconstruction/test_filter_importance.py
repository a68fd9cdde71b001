"""The filter importance `reconstruction`, and its life after the model has been created."""

import copy
import json

import pytest
import torch
from torch import nn

from compress_core import DataError, ModelError, create_compressed_model


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 4, generator=generator) + 1 for _ in range(8)]


def compressed(model, data, level=0.4, sample=(1, 4), **kwargs):
    params = {"filter_importance": "reconstruction", "multiple_of": 1, "schedule": "baseline", "prune_first_conv": True}
    config = {
        "target_device": "TRIAL",
        "input_info": {"sample_size": list(sample), "type": "long" if sample == Tokens.sample else "float"},
        "compression": {"algorithm": "filter_pruning", "pruning_init": level, "params": params},
    }
    return create_compressed_model(model, config, init_loader=data, **kwargs)


def measured(model, data, sample=(1, 4), **options):
    controller, _ = compressed(model, data, sample=sample, **options)
    (found,) = controller.get_compression_state()["algorithms"]["filter_pruning"]["state"]["measured"]
    return found


def rises(inputs, weight):
    """Returns by how much the error of `inputs @ weight.T` rises without each input, the others making up for it."""
    gram = inputs.T @ inputs / len(inputs)
    diagonal = gram.diagonal()
    damped = gram + torch.diag(0.1 * (diagonal + diagonal.mean() / 10))
    found = []
    for channel in range(len(gram)):
        others = [index for index in range(len(gram)) if index != channel]
        # Least squares of what is lost, held at the old weights: minimizes d A d' with d = -w in the removed column.
        root = torch.linalg.cholesky(damped).T
        made_up = torch.linalg.lstsq(root[:, others], root[:, [channel]] @ weight[:, [channel]].T).solution
        lost = root[:, [channel]] @ weight[:, [channel]].T - root[:, others] @ made_up
        found.append(float(lost.square().sum()))
    return found


def test_importance_is_the_rise_of_the_readers_error_when_the_others_make_up_for_a_channel():
    model = network().double()
    model[0] = nn.Sequential(nn.Linear(4, 6).double(), nn.ReLU())
    data = [batch.double() for batch in batches()]
    with torch.no_grad():
        inputs = model[0](torch.cat(data))
    expected = rises(inputs, model[1].weight.detach())
    assert measured(copy.deepcopy(model), data) == pytest.approx(expected, rel=1e-4)


class Reading(nn.Module):
    """One weight that reads channels in several calls of a forward."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.makes, self.reads = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.tied = nn.Linear(6, 3, bias=False)
        self.tied.weight = self.reads.weight

    def channels(self, x):
        return self.makes(x).relu(), self.makes(-x).relu()

    def forward(self, x):
        first, second = self.channels(x)
        if self.way == "by sample":
            return torch.stack([self.reads(row) for row in first])
        return self.reads(first) + (self.tied if self.way == "tied" else self.reads)(second)


@pytest.mark.parametrize("way", ["tied", "called twice", "by sample"])
def test_a_weight_that_reads_twice_in_a_forward_makes_two_errors(way):
    torch.manual_seed(0)
    model, data = Reading(way).double().eval(), [batch.double() for batch in batches()]
    with torch.no_grad():
        first, second = model.channels(torch.cat(data))
    inputs, calls = (first, 1) if way == "by sample" else (torch.cat([first, second]), 2)
    expected = [calls * rise for rise in rises(inputs, model.reads.weight.detach())]
    assert measured(copy.deepcopy(model), data) == pytest.approx(expected, rel=1e-4)


class Tokens(nn.Module):
    """An embedding, and a head with the same values: tied, or a copy."""

    sample = (1, 5)

    def __init__(self, tied):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.tokens.weight if tied else nn.Parameter(self.tokens.weight.detach().clone())

    def forward(self, x):
        return self.head(self.tokens(x).relu())

    @staticmethod
    def data():
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(9, (16, 5), generator=generator) for _ in range(4)]


class Autoencoder(nn.Module):
    """A linear layer, and the same weight transposed."""

    sample = (1, 4)

    def __init__(self, tied):
        super().__init__()
        self.encode = nn.Linear(4, 6)
        self.decode = None if tied else nn.Linear(4, 6, bias=False)
        if not tied:
            self.decode.weight.data.copy_(self.encode.weight.data)

    def forward(self, x):
        return self.encode(x).relu() @ (self.decode or self.encode).weight

    @staticmethod
    def data():
        return batches()


class ConvolutionalAutoencoder(nn.Module):
    """A convolution, and a transposed one with the same weight."""

    sample = (1, 3, 5, 5)

    def __init__(self, tied):
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, 6, 2), nn.ConvTranspose2d(6, 3, 2)
        weight = self.encode.weight
        self.decode.weight = weight if tied else nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return self.decode(self.encode(x).relu())

    @staticmethod
    def data():
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(16, 3, 5, 5, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("kind", [Tokens, Autoencoder, ConvolutionalAutoencoder])
def test_a_weight_that_makes_and_reads_channels_along_one_dimension_counts_like_two_weights(kind, caplog):
    found = []
    for tied in (False, True):
        torch.manual_seed(0)
        found.append(measured(kind(tied).eval(), kind.data(), kind.sample))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert "not counted in full" not in caplog.text


class ScaledHead(Tokens):
    def forward(self, x):
        return nn.functional.linear(self.tokens(x).relu(), 0.5 * self.tokens.weight) + self.head(self.tokens(x))


def test_an_embedding_whose_multiple_is_a_head_is_named(caplog):
    torch.manual_seed(0)
    measured(ScaledHead(tied=False).eval(), Tokens.data(), Tokens.sample)
    (found,) = [r.getMessage() for r in caplog.records if "not counted in full" in r.getMessage()]
    assert "'tokens.weight'" in found and "mul" in found and "may read the channels as well" in found


def test_a_batch_norm_without_running_statistics_scales_by_the_variance_of_its_inputs():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, track_running_stats=False)
    norm.weight.data.uniform_(0.5, 2.0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1), norm).eval()
    data = [torch.randn(64, 3, 3, 3)]
    other = copy.deepcopy(model)
    other[3] = nn.BatchNorm2d(5).eval()
    other[3].weight.data.copy_(norm.weight.data)
    with torch.no_grad():
        other[3].running_var.copy_(other[:3](data[0]).var((0, 2, 3), correction=0))
    expected = measured(other, data, (1, 3, 3, 3))
    assert measured(model, data, (1, 3, 3, 3)) == pytest.approx(expected, rel=1e-4)


def test_inputs_that_do_not_vary_tell_nothing():
    model = network()
    model[1] = nn.Linear(6, 5)
    before = copy.deepcopy(model.state_dict())
    message = r"(?s)^compression\.filter_pruning\.params\.filter_importance: .*'1\.weight': its inputs were the same"
    with pytest.raises(ModelError, match=message):
        compressed(model, [torch.ones(1, 4)])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_that_are_not_finite_are_refused_with_path_and_layer():
    data = batches()
    data[1][3, 2] = float("nan")
    with pytest.raises(DataError, match=r"^compression\.filter_pruning\.params\.filter_importance: .*'0\.weight'"):
        compressed(network(), data)


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
