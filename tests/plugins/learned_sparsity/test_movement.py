"""Scores, thresholds and the loss against the formulas of NNCF 2.16, written down independently, in float64."""

from __future__ import annotations

import copy
import io
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress_core import CompressionStage, ConfigError, DataError, UsageError
from compress_core.transforms import raw_parameter
from compress_learned_sparsity.movement.scores import MovementMask, capped, lowest_share
from tests.plugins.learned_sparsity.scores_helpers import (
    batches,
    create,
    network,
    same_tensors,
    steps,
    through_json,
    transforms,
)

KEY = "movement_sparsity"
PARAMS = {"warmup_start_epoch": 1, "warmup_end_epoch": 3, "importance_regularization_factor": 0.1}
FINE = PARAMS | {"enable_structured_masking": False}
BLOCKS = [
    {"mode": "block", "sparse_factors": [4, 3], "target_scopes": "0"},
    {"mode": "per_dim", "axis": 0, "target_scopes": ["2"]},
    {"mode": "per_dim", "axis": 1, "target_scopes": ["4"]},
]


def movement(model=None, structures=(), state=None, **params):
    model = network() if model is None else model
    return create(model, KEY, params=FINE | params, sparse_structure_by_scopes=list(structures), state=state)


def set_scores(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for mask in transforms(model, KEY).values():
        with torch.no_grad():
            mask.scores.copy_(torch.randn(mask.scores.shape, generator=generator, dtype=torch.float64))


def expanded(mask):
    scores = mask.scores.detach()
    for dim, step in enumerate(mask.block):
        scores = scores.repeat_interleave(step, dim)
    return scores


def test_shapes_of_scores():
    _, model = movement(structures=BLOCKS)
    shapes = {name: tuple(mask.scores.shape) for name, mask in transforms(model, KEY).items()}
    expected = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (16, 1), "2.bias": (16,), "4.weight": (1, 16)}
    assert shapes == expected | {"4.bias": (1,)}
    assert not any(mask.scores.any() for mask in transforms(model, KEY).values())


@pytest.mark.parametrize("threshold", [-0.3, 0.2, 5.0])
def test_masks_and_gradients_of_the_reference(threshold):
    _, model = movement(network(dtype=torch.float64), BLOCKS)
    set_scores(model)
    for name, mask in transforms(model, KEY).items():
        mask.update(threshold)
        values = expanded(mask)
        limit = min(threshold, float(torch.quantile(values, 0.98)))
        expected = values > limit
        if not expected.any():  # the block with the largest score has more than 2 % of the elements
            expected = values == values.max()
        assert torch.equal(mask.mask, expected), name
        weight = raw_parameter(model, name).detach().clone().requires_grad_()
        upstream = torch.randn(weight.shape, dtype=torch.float64)
        mask.scores.grad = None
        (mask(weight) * upstream).sum().backward()
        torch.testing.assert_close(weight.grad, upstream * expected, rtol=0, atol=0)
        product = upstream * weight.detach()
        for dim, (step, steps_) in enumerate(zip(mask.block, mask.scores.shape, strict=True)):
            product = product.unflatten(dim, (steps_, step)).sum(dim + 1)
        torch.testing.assert_close(mask.scores.grad, product, rtol=1e-12, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=70), st.integers(1, 9), st.floats(-5, 5))
def test_the_limit_is_the_quantile_of_what_is_expanded(values, elements, threshold):
    scores = torch.tensor(values, dtype=torch.float64)
    expected = min(threshold, float(torch.quantile(scores.repeat_interleave(elements), 0.98)))
    assert float(capped(scores, elements, threshold)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=40), st.integers(1, 9), st.floats(0, 0.5))
def test_the_lowest_share_is_that_of_what_is_expanded(values, elements, share):
    mask = MovementMask(torch.zeros(len(values) * elements, dtype=torch.float64), (elements,))
    other = MovementMask(torch.zeros(5, dtype=torch.float64), (1,))
    with torch.no_grad():
        mask.scores.copy_(torch.tensor(values, dtype=torch.float64))
        other.scores.copy_(torch.linspace(-1, 1, 5))
    everything = torch.cat([expanded(mask), other.scores.detach()]).sort().values
    wanted = float(everything[min(len(everything), int(share * len(everything)) + 1) - 1])
    assert lowest_share([mask, other], share) == pytest.approx(wanted, abs=1e-12)


def test_more_scores_than_torch_can_find_quantiles_of():
    scores = torch.zeros(2**24 + 2)
    scores[-1] = 1
    assert float(capped(scores, 1, 3.0)) == 0
    with pytest.raises(RuntimeError):
        torch.quantile(scores, 0.98)


def test_loss_of_the_reference():
    controller, model = movement(network(dtype=torch.float64), BLOCKS, steps_per_epoch=4, power=2.0)
    set_scores(model)
    losses = []
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(4):
            controller.scheduler.step()
            losses.append(controller.loss().item())
    masks = transforms(model, KEY)
    layers = []
    for index, (r, c) in ((0, (4, 3)), (2, (1, 24)), (4, (4, 1))):
        weight, bias = (torch.sigmoid(masks[f"{index}.{kind}"].scores.detach()) for kind in ("weight", "bias"))
        layers.append(0.5 * (float(weight.mean()) * r * c + float(bias.mean()) * r))
    times = [0.0] * 4 + [i / 8 for i in range(8)]
    expected = [0.1 * (1 - (1 - x) ** 2) * sum(layers) / 3 for x in times]
    assert losses == pytest.approx(expected, rel=1e-12)


def test_thresholds_of_the_reference():
    controller, model = movement(
        network(dtype=torch.float64), steps_per_epoch=2, init_importance_threshold=-1.5, final_importance_threshold=-0.5
    )
    set_scores(model)
    seen = []
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(2):
            controller.scheduler.step()
            seen.append(controller.importance_threshold)
    expected = [-math.inf] * 2 + [-1.5 + (1 - (1 - i / 4) ** 3) for i in range(4)]
    assert seen == pytest.approx(expected, rel=1e-12)
    controller.scheduler.epoch_step()
    assert controller.importance_threshold == -0.5
    assert controller.frozen
    for mask in transforms(model, KEY).values():
        if mask.scores.numel() > 4:
            assert torch.equal(mask.mask, mask.scores > -0.5)


def test_without_an_initial_threshold_it_begins_at_a_thousandth_of_the_scores():
    controller, model = movement(network(dtype=torch.float64), steps_per_epoch=2, final_importance_threshold=0.5)
    set_scores(model)
    controller.scheduler.epoch_step()
    controller.scheduler.epoch_step()
    everything = torch.cat([mask.scores.detach().flatten() for mask in transforms(model, KEY).values()])
    wanted = everything.sort().values[int(0.001 * everything.numel())]
    assert controller.importance_threshold == pytest.approx(float(wanted))
    assert controller.get_compression_state()["algorithms"][KEY]["state"]["initial"] == float(wanted)


@pytest.mark.parametrize("initial", [None, 0.1])
def test_a_warm_up_from_the_first_step_on_does_not_mask_everything(initial):
    given_ = {} if initial is None else {"init_importance_threshold": initial, "final_importance_threshold": 0.2}
    controller, model = movement(warmup_start_epoch=0, warmup_end_epoch=4, steps_per_epoch=4, **given_)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    levels = []
    steps(controller, model, optimizer, batches(4), 2, lambda: levels.append(controller.sparsity_level))
    assert levels[0] == 0
    assert max(levels) < 0.99
    for mask in transforms(model, KEY).values():
        assert mask.mask.any()
    if initial is None:
        assert levels[1] < 0.1


def test_training_reaches_a_level_and_freezes_it():
    controller, model = movement(importance_regularization_factor=0.5, final_importance_threshold=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.01)
    assert controller.compression_stage() is CompressionStage.UNCOMPRESSED
    steps(controller, model, optimizer, batches(6), 1)
    assert controller.sparsity_level == 0
    steps(controller, model, optimizer, batches(6), 2)
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    steps(controller, model, optimizer, batches(6), 1)
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    before = {name: mask.mask.clone() for name, mask in transforms(model, KEY).items()}
    assert controller.sparsity_level > 0.3
    assert controller.loss().item() == 0
    steps(controller, model, optimizer, batches(6), 2)
    assert all(torch.equal(before[name], mask.mask) for name, mask in transforms(model, KEY).items())
    assert not any(mask.scores.grad.any() for mask in transforms(model, KEY).values())
    with pytest.raises(UsageError, match="the masks are final"):
        controller.freeze(False)
    part = controller.statistics().movement_sparsity
    zeros = sum(int((~mask).sum()) for mask in before.values())
    assert part.sparsity_level == controller.sparsity_level == zeros / sum(m.numel() for m in before.values())
    plain = controller.strip()
    assert all(torch.equal(plain.get_parameter(n) != 0, before[n]) for n in before)


def test_freezing_before_the_end_can_be_undone():
    controller, model = movement(steps_per_epoch=6)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    steps(controller, model, optimizer, batches(6), 2)
    controller.freeze()
    level = controller.sparsity_level
    assert level > 0
    controller.scheduler.step()
    assert controller.sparsity_level == level
    controller.freeze(False)
    assert not controller.frozen
    assert controller.loss().item() > 0


@pytest.mark.parametrize("structured", [False, True])
def test_resumes_in_the_middle_of_the_warm_up_to_the_same_bits(structured):
    params = PARAMS | {"enable_structured_masking": structured}
    section = {
        "params": params,
        "sparse_structure_by_scopes": BLOCKS[:1],
        "root": {"input_info": {"sample_size": [8, 12]}},
    }
    data = batches(6)

    def half(controller, model, optimizer, part):
        for x in part:
            controller.scheduler.step()
            optimizer.zero_grad()
            ((model(x)[:, 0] - x.sum(1)).square().mean() + controller.loss()).backward()
            optimizer.step()

    controller, model = create(network(), KEY, **section)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    steps(controller, model, optimizer, data, 1)
    controller.scheduler.epoch_step()
    half(controller, model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    state = through_json(controller.get_compression_state())
    again, resumed = create(network(9), KEY, state=state, **section)
    values, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(values)
    other = torch.optim.Adam(resumed.parameters(), 0.02)
    other.load_state_dict(moments)
    assert again.loss().item() == controller.loss().item() > 0
    for c, m, o in ((controller, model, optimizer), (again, resumed, other)):
        half(c, m, o, data[3:])
        steps(c, m, o, data, 2)
    same_tensors(model.state_dict(), resumed.state_dict())
    assert controller.frozen
    assert again.frozen
    assert again.get_compression_state() == controller.get_compression_state()


def test_copies_share_nothing():
    controller, model = movement(steps_per_epoch=3)
    steps(controller, model, torch.optim.Adam(model.parameters(), 0.02), batches(3), 2)
    twin_controller, twin = copy.deepcopy((controller, model))
    same_tensors(model.state_dict(), twin.state_dict())
    steps(twin_controller, twin, torch.optim.Adam(twin.parameters(), 0.02), batches(3), 2)
    assert twin_controller.frozen
    assert not controller.frozen


def test_compiled_training_is_that_of_eager_mode():
    results = []
    for compiled in (False, True):
        controller, model = movement(structures=BLOCKS, warmup_end_epoch=2)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            controller.scheduler.epoch_step()
            for x in batches(2):
                controller.scheduler.step()
                optimizer.zero_grad()
                (run(x).square().mean() + controller.loss()).backward()
                optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_the_factor_on_gradients_is_on_those_of_the_scores_alone():
    found = []
    for factor in (None, 0.25):
        section = {} if factor is None else {"compression_lr_multiplier": factor}
        controller, model = create(network(), KEY, params=FINE | {"steps_per_epoch": 1}, **section)
        for _ in range(2):
            controller.scheduler.epoch_step()
        controller.scheduler.epoch_step(2) if controller.loss().item() == 0 else None
        (model(batches(1)[0]).square().sum() + controller.loss()).backward()
        scores = {n: m.scores.grad for n, m in transforms(model, KEY).items()}
        found.append((scores, raw_parameter(model, "0.weight").grad))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], 0.25 * gradient, rtol=1e-6, atol=1e-12)
    assert torch.equal(found[0][1], found[1][1])


def test_both_names_of_the_initial_threshold(caplog):
    for name in ("init_importance_threshold", "initial_importance_threshold"):
        with caplog.at_level(logging.WARNING):
            controller, _ = movement(**{name: 0.25})
        assert controller.get_compression_state()["algorithms"][KEY]["state"]["initial"] == 0.25
    assert "is not below final_importance_threshold" in caplog.text
    with pytest.raises(ConfigError, match="are the same; remove one"):
        movement(init_importance_threshold=0.1, initial_importance_threshold=0.1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"params": FINE | {"warmup_end_epoch": 1}}, r"warmup_end_epoch: is 1"),
        ({"params": FINE | {"warmup_start_epoch": 0}}, r"warmup_start_epoch: is 0"),
        ({"params": FINE | {"importance_regularization_factor": -1}}, "importance_regularization_factor"),
        ({"params": {"warmup_start_epoch": 1}}, "warmup_end_epoch"),
        ({"sparse_structure_by_scopes": [{"mode": "block", "target_scopes": "0"}]}, "sparse_factors is for the mode"),
        ({"sparse_structure_by_scopes": [{"mode": "fine", "axis": 1, "target_scopes": "0"}]}, "axis is for the mode"),
        (
            {"sparse_structure_by_scopes": [{"mode": "block", "sparse_factors": [5, 1], "target_scopes": "0"}]},
            r"sparse_structure_by_scopes\.0\.sparse_factors: blocks of 5 x 1 do not divide '0\.weight'",
        ),
        (
            {"sparse_structure_by_scopes": [BLOCKS[0], {"mode": "fine", "target_scopes": "{re}0"}]},
            r"sparse_structure_by_scopes\.1: matches '0\.weight', and so does .*scopes\.0",
        ),
        ({"sparse_structure_by_scopes": [{"mode": "fine", "target_scopes": "nowhere"}]}, r"0\.target_scopes"),
        ({"ignored_scopes": ["{re}."]}, "nothing to compress"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        create(network(), KEY, **({"params": FINE} | section))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="no linear layer that is trained"):
        movement(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_structured_masking_without_an_example_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"enable_structured_masking: true, the default.*Set it to false"):
        create(network(), KEY, params=PARAMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    controller, model = movement(network(dtype=dtype), BLOCKS, steps_per_epoch=1)
    set_scores(model)
    for _ in range(2):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
    assert model(batches(1)[0].to(dtype)).dtype == dtype
    assert 0 < controller.sparsity_level < 1
