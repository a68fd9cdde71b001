"""Importances that are measured with data, and those of other plugins."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_core import (
    Choice,
    ConfigError,
    DataError,
    ModelError,
    PluginError,
    Stage,
    create_compressed_model,
)
from compress_core.registry import use_registry
from compress_core.transforms import raw_parameter
from compress_core.transforms.weight import transformed_weight
from tests.contract.algorithms import fresh
from tests.plugins.magnitude_sparsity.importance_helpers import (
    DATA_KINDS,
    POINT,
    batches,
    create,
    document,
    inputs,
    masks,
    net,
    size,
    zeros,
)
from tests.zoo import ResidualNet, images, trained


def test_activation_is_magnitude_times_the_spread_of_the_input():
    model, data = net(12, 9), batches()
    weight = model[0].weight.detach().double()
    controller = create(model, data=data, mode="local", level=0.4)
    spread = (inputs(data) - inputs(data).mean(0)).square().mean(0)
    order = (weight.abs() * spread.sqrt()).flatten().argsort()
    expected = torch.ones(weight.numel(), dtype=torch.bool)
    expected[order[: round(0.4 * weight.numel())]] = False
    assert torch.equal(masks(model, controller)["0.weight"].flatten(), expected)


def test_second_order_is_the_error_after_the_others_made_up_for_it():
    model, data = net(6, 5), batches(6)
    weight, x = model[0].weight.detach().double(), inputs(data)
    controller = create(model, data=data, mode="local", level=0.2, initializer=damped(1e-6))
    x = x - x.mean(0)
    rise = torch.empty_like(weight)
    for row in range(5):
        for column in range(6):
            others = [j for j in range(6) if j != column]
            left = torch.linalg.lstsq(x[:, others], x[:, column] * weight[row, column]).solution
            rise[row, column] = (x[:, others] @ left - x[:, column] * weight[row, column]).square().mean()
    expected = torch.ones(30, dtype=torch.bool)
    expected[rise.flatten().argsort()[:6]] = False
    assert torch.equal(masks(model, controller)["0.weight"].flatten(), expected)


def damped(damping):
    return {"weight_reconstruction": {"num_samples": 256, "damping": damping}}


def error_after_least_squares(weight, support, x):
    """Squared error of the outputs, if what is left of each row is solved for."""
    total = 0.0
    for row, kept in zip(weight, support, strict=True):
        wanted = x @ row
        total += float((x[:, kept] @ torch.linalg.lstsq(x[:, kept], wanted).solution - wanted).square().mean())
    return total


def test_reconstruction_in_steps_leaves_what_can_make_up_for_the_rest():
    generator = torch.Generator().manual_seed(0)
    # Inputs of which half tell nearly all about the others.
    x = torch.randn(256, 12, generator=generator) @ torch.randn(12, 24, generator=generator)
    data = list((x + 0.3 * torch.randn(256, 24, generator=generator)).split(64))
    x, errors = inputs(data) - inputs(data).mean(0), {}
    for kind, steps in (("abs", None), ("reconstruction", 1), ("reconstruction", 4), ("reconstruction", 16)):
        model = net(24, 16)
        weight, options = model[0].weight.detach().double(), {} if steps is None else {"importance_steps": steps}
        controller = create(
            model, data=data, mode="local", level=0.7, kind=kind, initializer=damped(1e-3) if steps else None, **options
        )
        errors[kind, steps] = error_after_least_squares(weight, masks(model, controller)["0.weight"], x)
    assert errors["reconstruction", 1] == pytest.approx(errors["abs", None], rel=1e-9)
    assert errors["reconstruction", 4] < 0.8 * errors["abs", None]
    assert errors["reconstruction", 16] < errors["reconstruction", 4]


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("kind", DATA_KINDS)
@settings(max_examples=6, deadline=None)
@given(levels=st.lists(st.floats(0.05, 0.95), min_size=2, max_size=4))
def test_levels_are_exact_and_masks_nested(kind, mode, levels):
    model = net(12, 9, 7)
    controller = create(model, kind=kind, mode=mode, level=levels[0], sparsity_target=0.95)
    before = masks(model, controller)
    for level in levels:
        controller.set_sparsity_level(level)
        now = masks(model, controller)
        sizes = {name: mask.numel() for name, mask in now.items()}
        if mode == "global":
            assert zeros(now) == round(level * sum(sizes.values()))
        else:
            assert all(int((~now[name]).sum()) == round(level * n) for name, n in sizes.items())
        pairs = [(now[name], before[name]) for name in now]
        assert all(bool((a <= b).all()) for a, b in pairs) or all(bool((a >= b).all()) for a, b in pairs)
        before = now


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_what_earlier_stages_removed_goes_first(kind):
    model = trained(ResidualNet(), (images(),))
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.3,
        "params": {"pruning_target": 0.5, "prune_first_conv": True, "multiple_of": 1},
    }
    config = {"compression": [pruning, document(level=0.6, kind=kind)["compression"]]}
    controller, _ = create_compressed_model(model, config, init_loader=[images() for _ in range(4)])
    found = masks(model, controller)
    removed = 0
    for name, mask in found.items():
        left = transformed_weight(model, name, Stage.SPARSITY)
        gone = (left == 0) & (raw_parameter(model, name) != 0)
        removed += int(gone.sum())
        assert not (mask & gone).any(), name
    assert removed
    assert zeros(found) == round(0.6 * size(found))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_no_data_is_an_error_that_names_the_path_and_leaves_the_model(kind):
    model = net(12, 9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"magnitude_sparsity\.params\.weight_importance: needs calibration data"):
        create_compressed_model(model, document(kind=kind))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_random_numbers_and_weights_are_not_touched(kind):
    model = nn.Sequential(net(12, 9), nn.Dropout(), net(9, 4))
    stored, state = copy.deepcopy(dict(model.named_parameters())), torch.get_rng_state()
    create(model, kind=kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    assert model.training


def test_reconstruction_at_level_zero_and_unused_steps_are_refused():
    with pytest.raises(ConfigError, match="sparsity_init: is 0"):
        create(net(12, 9), kind="reconstruction", level=0.0)
    with pytest.raises(ConfigError, match="importance_steps"):
        create(net(12, 9), kind="activation", importance_steps=4)
    with pytest.raises(ConfigError, match="importance_steps"):
        create(net(12, 9), kind="abs", importance_steps=4)


class Embedded(nn.Module):
    """A weight of which data says nothing."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), net(6, 7)
        nn.init.constant_(self.embedding.weight, 1e-6)

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_a_weight_without_evidence_gets_the_level_by_itself_and_is_named(kind, caplog):
    model = Embedded()
    data = list(torch.randint(10, (128, 3), generator=torch.Generator().manual_seed(0)).split(32))
    controller = create(model, data=data, kind=kind, level=0.5)
    found = masks(model, controller)
    assert int((~found["embedding.weight"]).sum()) == 30
    assert zeros(found) == round(0.5 * size(found))
    assert "'embedding.weight' is ranked by its magnitudes alone" in caplog.text


class Measured:
    """Data says that the last column matters most."""

    returns = "factors"
    uses_steps = True

    def __init__(self, result):
        self.result = result

    def measure(self, request):
        assert request.steps == 16
        assert next(iter(request.data.batches(1)))[1] == 64
        return {name: self.result(request.supports[name]) for name in request.weights}


def rising(support):
    return torch.arange(1.0, support.shape[1] + 1).square()[None]


def third_party(**choices):
    values = [Choice(POINT, name, value, "a test") for name, value in choices.items()]
    return use_registry(fresh(compress_choices=lambda self: values))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_inputs_that_do_not_vary_leave_the_choice_to_magnitude_and_say_so(kind, caplog):
    model, other = net(12, 9, 7), net(12, 9, 7)
    controller = create(model, kind=kind, level=0.5, data=[torch.ones(1, 12)])
    expected = masks(other, create(other, kind="normed_abs", level=0.5))
    for name, mask in masks(model, controller).items():
        assert torch.equal(mask, expected[name])
        assert f"'{name}' is ranked by its magnitudes alone: its inputs were the same" in caplog.text


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_a_weight_that_is_not_finite_is_named_and_the_model_stays(kind):
    model = net(12, 9, 7)
    model[1].weight.data[2, 3] = float("inf")
    with pytest.raises(ModelError, match=r"params\.weight_importance: the weight '1\.weight' holds NaN or infinity"):
        create(model, kind=kind)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_functions_and_objects_of_other_plugins_choose():
    with third_party(square=torch.square, rising=Measured(rising)):
        model, plain = net(12, 9), net(12, 9)
        found = masks(model, create(model, kind="square", level=0.5))
        expected = masks(plain, create(plain, kind="abs", level=0.5))
        assert torch.equal(found["0.weight"], expected["0.weight"])
        model = net(12, 9)
        kept = masks(model, create(model, kind="rising", level=0.5))["0.weight"]
        assert kept[:, 6:].sum() > 2 * kept[:, :6].sum()


@pytest.mark.parametrize(
    "value",
    [
        lambda w: w.sum(),
        lambda w: -w.abs() - 1,
        lambda w: w * torch.nan,
        lambda w: w.abs().long(),
        lambda w: None,
        Measured(lambda support: torch.ones(3)),
        Measured(lambda support: -rising(support)),
        Measured(lambda support: support),
    ],
)
def test_wrong_importances_are_refused(value):
    with third_party(wrong=value), pytest.raises(PluginError, match=r"(importance|mask) of '0\.weight'"):
        create(net(12, 9), kind="wrong")


def test_a_function_cannot_change_the_weight_and_sees_no_infinite_ones():
    with third_party(inplace=torch.Tensor.abs_):
        model = net(12, 9)
        before = model[0].weight.detach().clone()
        create(model, kind="inplace")
        assert torch.equal(raw_parameter(model, "0.weight"), before)
        broken = net(12, 9)
        with torch.no_grad():
            broken[0].weight[0, 0] = torch.inf
        with pytest.raises(ModelError, match="holds NaN or infinity"):
            create(broken, kind="inplace")


def test_what_is_no_importance_is_not_registered():
    for value in (3, type("NoKind", (), {"measure": None})(), type("NoSteps", (), {**KIND, "returns": "masks"})()):
        with pytest.raises(PluginError, match=r"must be a function|`returns` is one of|`uses_steps` is True"):
            third_party(wrong=value)


KIND = {"measure": lambda self, request: {}}
