"""Tensors really get smaller, in `strip` and in the middle of training, and compute the same."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress_core import StateError, UsageError, create_compressed_model, load_compressed_model
from compress_core.channels import ShrinkError
from tests.plugins.filter_pruning.pruning_helpers import Chain, config, evaluated, gone, inputs, pruned, seen, shapes


class Forks(nn.Module):
    """Depthwise and grouped convolutions, concatenation, a residual, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + F.relu6(self.point(self.depthwise(x)))
        x = self.norm(self.grouped(torch.cat([x, x.abs()], 1))).tanh()
        return self.head(self.up(x).mean((2, 3)))


def test_strip_leaves_new_shapes_and_consistent_attributes():
    controller, model = pruned(seen(Chain()), 0.5)
    expected = evaluated(model)
    small = controller.strip()
    assert shapes(small) == {
        "conv1.weight": (4, 3, 3, 3),
        "conv1.bias": (4,),
        "bn1.weight": (4,),
        "bn1.bias": (4,),
        "conv2.weight": (6, 4, 3, 3),
        "bn2.weight": (6,),
        "bn2.bias": (6,),
        "conv3.weight": (4, 6, 3, 3),
        "conv3.bias": (4,),
        "linear.weight": (5, 64),
        "linear.bias": (5,),
    }
    assert (small.conv2.in_channels, small.conv2.out_channels) == (4, 6)
    assert small.bn2.num_features == 6
    assert small.bn2.running_mean.shape == small.bn2.running_var.shape == (6,)
    assert small.linear.in_features == 64
    torch.testing.assert_close(evaluated(small), expected, rtol=1e-5, atol=1e-6)
    assert {type(module) for module in small.modules()} == {type(module) for module in Chain().modules()}
    assert shapes(model)["conv1.weight"] == (8, 3, 3, 3)  # strip worked on a copy


def test_groups_and_what_they_tie():
    controller, model = pruned(seen(Forks()), 0.5)
    expected = evaluated(model)
    small = controller.strip()
    torch.testing.assert_close(evaluated(small), expected, rtol=1e-5, atol=1e-6)
    assert small.depthwise.groups == small.depthwise.in_channels == small.stem.out_channels == 4
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (2, 8, 6)
    assert small.up.out_channels == 3
    small.train()(inputs()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_certificate_is_in_the_statistics():
    controller, _ = pruned(seen(Chain()), 0.5)
    assert controller.statistics().filter_pruning.certificate is None
    controller.strip()
    found = json.loads(json.dumps(controller.statistics().to_dict()))["filter_pruning"]["certificate"]
    assert 0 <= found["eval_difference"] < 1e-9
    assert 0 <= found["train_difference"] < 1e-9
    assert found["dtype"] == "float64"
    assert "shrunk model differs" in controller.statistics().to_str()


def test_strip_in_place():
    controller, model = pruned(seen(Chain()), 0.5)
    expected, parameter = evaluated(model), model._modules["conv1"]._parameters["weight"]
    small = controller.strip(do_copy=False)
    assert small is model
    assert model.conv1.weight is parameter
    assert parameter.shape == (4, 3, 3, 3)
    torch.testing.assert_close(evaluated(model), expected, rtol=1e-5, atol=1e-6)


class Fickle(Chain):
    """Reads a size of its own once `strict` is set."""

    strict = False

    def forward(self, x):
        if self.strict and self.conv1.out_channels != 8:
            raise ValueError("expected 8 channels")
        return super().forward(x)


@pytest.mark.parametrize("do_copy", [True, False])
def test_a_model_that_does_not_bear_it_is_left_alone(do_copy):
    controller, model = pruned(seen(Fickle()), 0.5)
    model.strict = True
    expected, before = evaluated(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ShrinkError, match="expected 8 channels"):
        controller.strip(do_copy=do_copy)
    with pytest.raises(ShrinkError, match="expected 8 channels"):
        controller.shrink()
    assert torch.equal(evaluated(model), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    controller.set_pruning_level(0.0)
    controller.strip(do_copy=do_copy)


def test_nothing_masked_nothing_shrunk():
    controller, model = pruned(seen(Chain()), 0.0)
    expected = evaluated(model)
    assert torch.equal(evaluated(controller.strip()), expected)
    assert controller.shrink_plan["tensors"] == {}
    with pytest.raises(UsageError, match="nothing to shrink"):
        controller.shrink()


class TestCheckpoints:
    """A small model is weights and a plan for the user's class."""

    def test_round_trip(self, tmp_path):
        controller, _ = pruned(seen(Chain()), 0.5)
        small = controller.strip()
        torch.save(small.state_dict(), tmp_path / "weights.pt")
        (tmp_path / "plan.json").write_text(json.dumps(controller.shrink_plan))
        weights = torch.load(tmp_path / "weights.pt", weights_only=True)
        plan = json.loads((tmp_path / "plan.json").read_text())
        fresh = Chain()
        assert load_compressed_model(fresh, weights, plan) is fresh
        assert torch.equal(evaluated(fresh), evaluated(small))
        assert fresh.conv2.in_channels == 4

    @pytest.mark.parametrize(
        ("make", "change", "message"),
        [
            (lambda: Chain((8, 16, 8)), lambda w, p: None, "does not fit this model: 'conv2.weight' has the shape"),
            (lambda: nn.Linear(2, 2), lambda w, p: None, "has no tensor"),
            (Chain, lambda w, p: w.pop("conv1.weight"), "weights do not fit"),
            (Chain, lambda w, p: p.update(format=2), r"^plan\.format: .* got 2"),
            (Chain, lambda w, p: p["tensors"]["conv1.weight"]["kept"].update({"0": [5, 3]}), r"^plan\.tensors\."),
            (Chain, lambda w, p: p["tensors"]["conv1.weight"]["kept"].update({"0": [0, 8]}), r"^plan\.tensors\."),
        ],
    )
    def test_what_does_not_belong_together_is_refused_and_changes_nothing(self, make, change, message):
        controller, _ = pruned(seen(Chain()), 0.5)
        weights, plan = controller.strip().state_dict(), json.loads(json.dumps(controller.shrink_plan))
        change(weights, plan)
        model = make()
        before, attributes = copy.deepcopy(model.state_dict()), repr(model)
        with pytest.raises(StateError, match=message):
            load_compressed_model(model, weights, plan)
        assert repr(model) == attributes
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def optimizers():
    return {
        "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-3),
        "Nesterov": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
        "Adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-2),
        "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    }


def train(model, optimizer, steps, start, ema=None):
    model.train()
    losses = []
    for step in range(start, start + steps):
        x = inputs(8, seed=step).double()
        loss = torch.nn.functional.cross_entropy(model(x), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if ema is not None:
            ema.update_parameters(model)
    return losses


class TestInTraining:
    @pytest.mark.parametrize("name", list(optimizers()))
    def test_the_next_100_steps_follow_the_masked_run(self, name):
        torch.manual_seed(4)
        plain = seen(Chain()).double()
        runs = []
        for shrinks in (False, True):
            loader = [inputs().double()]
            controller, model = create_compressed_model(copy.deepcopy(plain), config(0.5), init_loader=loader)
            optimizer = optimizers()[name](model.parameters())
            ema = AveragedModel(model, avg_fn=lambda average, new, count: 0.9 * average + 0.1 * new)
            train(model, optimizer, 10, 0, ema)
            identities = [id(p) for p in model.parameters()]
            if shrinks:
                loss = model(inputs().double()).sum()  # a graph of the larger model is still alive
                controller.shrink(optimizer, ema)
                assert identities == [id(p) for p in model.parameters()]
                assert shapes(model)["conv2.weight"] == (6, 4, 3, 3)
                del loss
            losses = train(model, optimizer, 100, 10, ema)
            runs.append((losses, evaluated(model, inputs().double()), evaluated(ema, inputs().double())))
        for masked, shrunk in zip(*runs, strict=True):
            torch.testing.assert_close(torch.as_tensor(shrunk), torch.as_tensor(masked), rtol=1e-5, atol=1e-7)

    def test_masked_filters_stay_zero_under_momentum_decay_and_averaging(self):
        controller, model = pruned(seen(Chain()), 0.5)
        model.double()
        before = gone(controller)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        ema = AveragedModel(model)
        train(model, optimizer, 5, 0, ema)
        assert gone(controller) == before
        for network in (model, ema.module):
            assert not network.conv1.weight[before[0]].any()
            assert not network.bn1.bias[before[0]].any()
            assert not network.conv2.weight[:, before[0]].any()

    def test_pruning_goes_on_after_shrinking_and_resumes(self):
        plain = seen(Chain((16, 16, 16)))
        document = config(0.25, pruning_target=0.75)
        controller, model = create_compressed_model(copy.deepcopy(plain), document)
        controller.shrink()
        assert controller.pruning_level == 0.25
        controller.set_pruning_level(0.5)
        assert [len(channels) for channels in gone(controller).values()] == [4, 4, 4]
        controller.shrink()
        controller.set_pruning_level(0.75)
        assert controller.pruning_level == 0.75
        state = json.loads(json.dumps(controller.get_compression_state()))
        resumed, twin = create_compressed_model(copy.deepcopy(plain), document, compression_state=state)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(evaluated(twin), evaluated(model))
        assert resumed.pruning_level == 0.75
        small = resumed.strip()
        assert small.conv2.weight.shape == (4, 4, 3, 3)
        torch.testing.assert_close(evaluated(small), evaluated(model), rtol=1e-5, atol=1e-6)
        fresh = load_compressed_model(copy.deepcopy(plain), small.state_dict(), resumed.shrink_plan)
        assert torch.equal(evaluated(fresh), evaluated(small))
        figures = resumed.statistics().filter_pruning
        assert figures.current_parameters == sum(p.numel() for p in small.parameters())

    def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changes(self):
        controller, model = pruned(seen(Chain()), 0.5)
        model.double()
        optimizer = torch.optim.Adafactor(model.parameters())
        train(model, optimizer, 1, 0)
        before = shapes(model)
        with pytest.raises(UsageError, match=r"Adafactor keeps 'row_var' of another shape"):
            controller.shrink(optimizer)
        assert shapes(model) == before

    def test_an_average_of_another_model_is_refused_before_anything_changes(self):
        controller, model = pruned(seen(Chain()), 0.5)
        before = shapes(model)
        with pytest.raises(UsageError, match="ema must be a copy of the compressed model"):
            controller.shrink(ema=Chain())
        assert shapes(model) == before


def test_state_of_another_model_is_refused():
    controller, _ = pruned(seen(Chain()), 0.5)
    state = controller.get_compression_state()
    with pytest.raises(StateError, match=r"does not fit this model.*has to have the size 12"):
        create_compressed_model(Chain((8, 16, 8)), config(0.5), compression_state=state)


def test_latency_is_measured_and_reported():
    controller, _ = pruned(seen(Chain()), 0.5)
    latency = controller.measure_latency(rounds=3)
    assert latency.masked > 0
    assert latency.shrunk > 0
    assert controller.statistics().filter_pruning.latency == latency
    assert "ms for a forward" in controller.statistics().to_str()


class NamedTwice(nn.Module):
    """A layer whose weight the model holds under a name of its own as well."""

    def __init__(self):
        super().__init__()
        self.encode, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.table = self.encode.weight

    def forward(self, x):
        return self.out(self.encode(x).relu())


def test_a_weight_that_the_model_names_a_second_time_is_pruned_and_stays_one():
    torch.manual_seed(0)
    section = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}}
    config = {"input_info": {"sample_size": [1, 4]}, "compression": section}
    controller, model = create_compressed_model(NamedTwice().eval(), config)
    small, x = controller.strip(), torch.randn(5, 4)
    assert small.encode.weight.shape == (3, 4) and small.table is small.encode.weight
    torch.testing.assert_close(small(x), model(x))
