"""Importances: of other plugins, and measured with data."""

import copy
import io
import itertools
import json
import pickle

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
from compress_core.transforms import get_weight_transform, raw_parameter
from compress_core.transforms.weight import transformed_weight
from tests.contract.algorithms import fresh
from tests.zoo import ResidualNet, images, trained

POINT = "magnitude_sparsity.weight_importance"
DATA_KINDS = ("activation", "second_order", "reconstruction")


def batches(features=12, count=4, size=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, features, generator=generator)
    x = (x + 0.9 * x.roll(1, 1)) * torch.linspace(0.2, 3.0, features)
    return list(x.split(size))


def net(*sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


def document(level=0.5, kind="activation", mode="global", initializer=None, **params):
    section = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": level,
        "params": {"weight_importance": kind, "sparsity_level_setting_mode": mode, "sparsity_target": 0.9, **params},
        "initializer": initializer or {},
    }
    return {"compression": section}


def create(model, *, data=None, **options):
    return create_compressed_model(model, document(**options), init_loader=batches() if data is None else data)[0]


def masks(model, controller):
    names = controller.sparsified_module_info
    return {n: get_weight_transform(model, n, "magnitude_sparsity").mask.clone() for n in names}


def zeros(found):
    return sum(int((~mask).sum()) for mask in found.values())


def size(found):
    return sum(mask.numel() for mask in found.values())


def inputs(data, count=256):
    return torch.cat(data)[:count].double()


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


# Life after the creation.


def run_epochs(controller, model, data, epochs, seen):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for batch in data[:2]:
            controller.scheduler.step()
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        seen.append(masks(model, controller))


@pytest.mark.parametrize("kind", [*DATA_KINDS, "normed_abs", "abs"])
def test_an_unchanged_level_leaves_the_masks_after_reconstruction(kind):
    model = net(12, 9, 7)
    controller = create(
        model, kind=kind, level=0.6, sparsity_target=0.6, initializer={"weight_reconstruction": {"num_samples": 256}}
    )
    chosen = masks(model, controller)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    assert all(torch.equal(mask, chosen[name]) for name, mask in masks(model, controller).items())


def test_without_data_an_unchanged_level_follows_trained_weights():
    model = net(12, 9)
    controller = create(model, kind="abs", level=0.5, sparsity_target=0.5)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    with torch.no_grad():
        raw_parameter(model, "0.weight").copy_(raw_parameter(model, "0.weight").flip(0, 1))
    before = masks(model, controller)["0.weight"]
    controller.scheduler.epoch_step()
    assert torch.equal(masks(model, controller)["0.weight"], before.flip(0, 1))


@pytest.mark.parametrize("kind", ["activation", "abs"])
def test_weights_loaded_without_masks_are_ranked_anew(kind):
    model = net(12, 9)
    other = {name: value.flip(-1) for name, value in model.state_dict().items()}
    reference = net(12, 9)
    reference.load_state_dict(other)
    expected = masks(reference, create(reference, kind=kind, level=0.5, sparsity_target=0.5))
    controller = create(model, kind=kind, level=0.5, sparsity_target=0.5)
    model.load_state_dict(other)
    controller.scheduler.epoch_step()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(model, controller).items())


def test_a_falling_level_brings_back_what_matters_most():
    model, data = net(12, 9), batches()
    controller = create(model, data=data, level=0.8, mode="local")
    spread = (inputs(data) - inputs(data).mean(0)).square().mean(0).sqrt()
    importance = (raw_parameter(model, "0.weight").detach() * spread).abs()
    gone = ~masks(model, controller)["0.weight"]
    controller.set_sparsity_level(0.5)
    back = gone & masks(model, controller)["0.weight"]
    still = gone & ~masks(model, controller)["0.weight"]
    assert importance[back].min() > importance[still].max()


@pytest.mark.parametrize("kind", DATA_KINDS)
@pytest.mark.parametrize("mode", ["global", "local"])
def test_resuming_continues_with_the_same_bits(kind, mode):
    data, options = batches(), {"kind": kind, "mode": mode, "level": 0.3, "sparsity_target_epoch": 4}
    whole = net(12, 9, 7)
    controller, expected = create(whole, data=data, **options), []
    run_epochs(controller, whole, data, 4, expected)

    first, found = net(12, 9, 7), []
    controller = create(first, data=data, **options)
    run_epochs(controller, first, data, 2, found)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = json.loads(json.dumps(controller.get_compression_state()))
    resumed = net(12, 9, 7)
    controller, _ = create_compressed_model(resumed, document(**options), compression_state=saved)
    resumed.load_state_dict(torch.load(file))
    run_epochs(controller, resumed, data, 2, found)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert all(torch.equal(a[name], b[name]) for name in a), step
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_without_data(copied):
    model = net(12, 9, 7)
    controller = create(model, level=0.3)
    other, twin = copied((controller, model))
    controller.set_sparsity_level(0.7)
    other.set_sparsity_level(0.7)
    found = masks(twin, other)
    assert all(torch.equal(mask, found[name]) for name, mask in masks(model, controller).items())


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_single_layers_and_freezing(kind):
    model = net(12, 9, 7)
    controller = create(model, level=0.4, kind=kind)
    before = masks(model, controller)
    controller.set_sparsity_level(0.8, module_info="1")
    after = masks(model, controller)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert int((~after["1.weight"]).sum()) == round(0.8 * 63)
    controller.freeze(True)
    controller.scheduler.epoch_step(next_epoch=200)
    assert all(torch.equal(mask, after[name]) for name, mask in masks(model, controller).items())


def test_factors_are_small_and_saved():
    model = net(12, 9)
    create(model)
    factors = {name: value for name, value in model.state_dict().items() if name.endswith("factor")}
    assert [tuple(value.shape) for value in factors.values()] == [(1, 12)]


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_convolutions_with_groups_and_tied_weights(kind):
    model = trained(ResidualNet(), (images(),))
    controller = create(model, data=[images() for _ in range(4)], kind=kind, level=0.5)
    found = masks(model, controller)
    assert zeros(found) == round(0.5 * size(found))


# Importances of other plugins.


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


# With other algorithms, and other layers.


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_factors_shrink_with_the_weight_and_levels_go_on(kind):
    model = trained(ResidualNet(), (images(),))
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"pruning_target": 0.5, "prune_first_conv": True, "multiple_of": 1},
    }
    config = {"compression": [pruning, document(level=0.3, kind=kind)["compression"], {"algorithm": "quantization"}]}
    controller, _ = create_compressed_model(model, config, init_loader=[images() for _ in range(4)])
    before = zeros(masks(model, controller))
    with torch.no_grad():
        expected = model.eval()(images())
        controller.shrink()
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert zeros(masks(model, controller)) < before
    controller.set_sparsity_level(0.8)
    found = masks(model, controller)
    assert zeros(found) == round(0.8 * size(found))


class Attention(nn.Module):
    """Projections of attention, a layer that is called twice, a product of its own, and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.own = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.depthwise(self.twice(self.twice(x).relu()))
        return x @ self.own[:6]


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("kind", DATA_KINDS)
def test_attention_layers_called_twice_and_own_weights(kind, mode):
    model = Attention()
    data = list(torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0)).split(16))
    controller = create(model, data=data, kind=kind, mode=mode, level=0.4)
    found = masks(model, controller)
    assert {"attention.in_proj_weight", "twice.weight", "depthwise.weight"} <= found.keys()
    wanted = round(0.4 * size(found)) if mode == "global" else sum(round(0.4 * m.numel()) for m in found.values())
    assert zeros(found) == wanted
    controller.set_sparsity_level(0.7)
    assert controller.sparsity_level == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", DATA_KINDS)
def test_other_dtypes(kind, dtype):
    model = net(12, 9, 7).to(dtype)
    controller = create(model, data=[batch.to(dtype) for batch in batches()], kind=kind, level=0.4)
    for level in (0.4, 0.7, 0.2):
        controller.set_sparsity_level(level)
        found = masks(model, controller)
        assert zeros(found) == round(level * size(found))


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_inputs_that_are_always_zero_and_constant_weights(kind):
    model, data = net(12, 9, 7), [batch * (torch.arange(12) > 3) for batch in batches()]
    nn.init.zeros_(model[1].weight)
    controller = create(model, data=data, kind=kind, level=0.2)
    found = masks(model, controller)
    assert zeros(found) == round(0.2 * size(found))
    controller.set_sparsity_level(0.6)
    assert zeros(masks(model, controller)) == round(0.6 * size(found))


def test_per_step_updates_remove_and_never_swap():
    model, data = net(12, 9, 7), batches()
    options = {"sparsity_target_epoch": 3, "update_per_optimizer_step": True, "steps_per_epoch": 2}
    controller, seen = create(model, data=data, level=0.1, **options), []
    run_epochs(controller, model, data, 4, seen)
    for before, after in itertools.pairwise(seen):
        assert all(bool((after[name] <= before[name]).all()) for name in after)
    assert zeros(seen[-1]) == round(0.9 * size(seen[-1]))


def trained_on_blobs():
    """A small network and images that it tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (1024,), generator=generator)
    patterns = torch.randn(8, 3, 8, 8, generator=generator)
    x = patterns[labels] + 1.2 * torch.randn(1024, 3, 8, 8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(4):
            for batch, target in zip(x[:768].split(64), labels[:768].split(64), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch), target).backward()
                optimizer.step()
    return model.eval(), x, labels


def test_reconstruction_in_steps_keeps_accuracy_that_magnitude_loses():
    plain, x, labels = trained_on_blobs()
    repair = {
        "weight_reconstruction": {"num_samples": 256},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 256},
    }
    found = {}
    for kind in ("normed_abs", "reconstruction"):
        model = copy.deepcopy(plain)
        create(model, data=list(x[:256].split(64)), kind=kind, level=0.95, sparsity_target=0.95, initializer=repair)
        with torch.no_grad():
            found[kind] = float((model.eval()(x[768:]).argmax(1) == labels[768:]).float().mean())
    with torch.no_grad():
        dense = float((plain(x[768:]).argmax(1) == labels[768:]).float().mean())
    assert dense > 0.9
    assert found["reconstruction"] > found["normed_abs"] + 0.05, found
