"""`compression_lr_multiplier` as learning rates, and where as a factor on gradients it does nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from compress_core import UsageError, create_compressed_model, load_checkpoint, save_checkpoint
from compress_core.transforms import scaled_gradient
from tests.zoo import ResidualNet, images

QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}}}
SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def create(root=None, own=None, *others):
    section = {**QUANTIZATION, **({} if own is None else {"compression_lr_multiplier": own})}
    document = {"compression": [section, *others], **({} if root is None else {"compression_lr_multiplier": root})}
    torch.manual_seed(0)
    return create_compressed_model(ResidualNet(), document, init_loader=[images()])


def step(model, optimizer, times=3):
    """Returns how far each parameter has moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(times):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def of_transforms(values):
    return {name: value for name, value in values.items() if "transforms." in name}


@pytest.mark.parametrize(
    ("root", "own", "factor"), [(None, None, 1.0), (0.5, None, 0.5), (0.5, 4.0, 4.0), (None, 0.1, 0.1)]
)
def test_groups_have_every_parameter_once_and_the_learning_rates_of_the_config(root, own, factor):
    controller, model = create(root, own, SPARSITY)
    first, second = controller.parameter_groups(0.2, weight_decay=0.01, compression_weight_decay=0.0)
    assert (first["name"], first["lr"], first["weight_decay"]) == ("model", 0.2, 0.01)
    assert (second["name"], second["lr"], second["weight_decay"]) == ("quantization", pytest.approx(0.2 * factor), 0.0)
    learned = {id(p) for p in of_transforms(dict(model.named_parameters())).values()}
    assert {id(p) for p in second["params"]} == learned and len(second["params"]) == len(learned)
    assert sorted(id(p) for g in (first, second) for p in g["params"]) == sorted(id(p) for p in model.parameters())


def test_decay_is_left_to_the_optimizer_or_the_same_for_all():
    controller, _ = create()
    assert all("weight_decay" not in group for group in controller.parameter_groups(0.1))
    assert [group["weight_decay"] for group in controller.parameter_groups(0.1, weight_decay=0.3)] == [0.3, 0.3]
    groups = controller.parameter_groups(0.1, compression_weight_decay=0.0)
    assert ["weight_decay" in group for group in groups] == [False, True]


def test_without_anything_that_learns_there_is_one_group():
    controller, model = create_compressed_model(nn.Linear(4, 4), {"compression": SPARSITY})
    (group,) = controller.parameter_groups(0.1)
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_numbers_that_are_none_are_refused(bad):
    controller, _ = create()
    for keywords in ({"lr": bad}, {"lr": 0.1, "weight_decay": bad}, {"lr": 0.1, "compression_weight_decay": bad}):
        if keywords.get("lr") == 0.1 and bad is None:
            continue
        with pytest.raises(UsageError, match=r"parameter_groups\(\): \w+ must be a number from 0 on"):
            controller.parameter_groups(**keywords)


def test_with_sgd_both_ways_are_the_same_and_with_adam_groups_alone_act():
    moved = {}
    kinds = {"sgd": torch.optim.SGD, "adam": lambda groups, lr: torch.optim.Adam(groups, lr=lr, eps=1e-30)}
    for name, kind in kinds.items():
        for factor in (None, 0.1):
            for grouped in (False, True):
                controller, model = create(factor)
                lr = 1e-2 if name == "sgd" else 1e-3
                given = controller.parameter_groups(lr) if grouped else model.parameters()
                moved[name, factor, grouped] = of_transforms(step(model, kind(given, lr=lr), times=1))
    assert max(values.abs().max() for values in moved["sgd", None, False].values()) > 1e-3
    for name, values in moved["sgd", None, False].items():
        for grouped in (False, True):
            torch.testing.assert_close(moved["sgd", 0.1, grouped][name], 0.1 * values, rtol=1e-3, atol=1e-6)
        plain = moved["adam", None, False][name]
        torch.testing.assert_close(moved["adam", 0.1, False][name], plain, rtol=1e-2, atol=1e-7)
        torch.testing.assert_close(moved["adam", 0.1, True][name], 0.1 * plain, rtol=1e-2, atol=1e-6)


def test_gradients_are_multiplied_until_there_are_groups_and_copies_do_the_same():
    def gradients(model):
        model.zero_grad()
        model(images()).square().sum().backward()
        return of_transforms({name: parameter.grad for name, parameter in model.named_parameters()})

    controller, model = create(0.25)
    plain = gradients(create()[1])
    twin_controller, twin = copy.deepcopy((controller, model))
    for found in (gradients(model), gradients(twin)):
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], 0.25 * gradient)
    assert twin_controller.parameter_groups(0.1)[1]["lr"] == pytest.approx(0.025)
    torch.testing.assert_close(gradients(twin), plain)
    torch.testing.assert_close(gradients(model), {name: 0.25 * gradient for name, gradient in plain.items()})


def test_groups_resume_to_the_same_bits(tmp_path):
    def start(state=None):
        document = {"compression": QUANTIZATION, "compression_lr_multiplier": 0.1}
        torch.manual_seed(0)
        data = {"init_loader": [images()]} if state is None else {"compression_state": state}
        controller, model = create_compressed_model(ResidualNet(), document, **data)
        return controller, model, torch.optim.AdamW(controller.parameter_groups(1e-3, compression_weight_decay=0.0))

    controller, model, optimizer = start()
    step(model, optimizer)
    save_checkpoint(tmp_path / "run.pt", controller, optimizer=optimizer)
    again, resumed, its_optimizer = start(controller.get_compression_state())
    load_checkpoint(tmp_path / "run.pt", again, optimizer=its_optimizer)
    step(model, optimizer)
    step(resumed, its_optimizer)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in model.state_dict().items())


class AdamWEightBit(torch.optim.Optimizer):
    """An optimizer of another library."""


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (torch.optim.Adam, True),
        (torch.optim.AdamW, True),
        (torch.optim.RMSprop, True),
        (torch.optim.Adagrad, True),
        (torch.optim.Rprop, True),
        (lambda parameters: AdamWEightBit(parameters, {"lr": 1.0}), True),
        (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), False),
        (torch.optim.ASGD, False),
    ],
)
def test_optimizers_that_undo_a_factor_are_warned_about_once(make, warned, caplog):
    controller, model = create(0.5)
    optimizer = make(model.parameters())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            controller.check_optimizers(optimizer, None)
    assert caplog.text.count("give the optimizer controller.parameter_groups(lr)") == warned


def test_nothing_is_said_where_the_factor_acts_or_there_is_none(caplog, tmp_path):
    controller, model = create(0.5)
    controller.check_optimizers(torch.optim.Adam([model.conv1._parameters["weight"]]))  # has none of the scales
    controller.check_optimizers(torch.optim.Adam(controller.parameter_groups(0.1)))
    plain, its_model = create()
    plain.check_optimizers(torch.optim.Adam(its_model.parameters()))
    assert "parameter_groups" not in caplog.text
    controller, model = create(0.5)
    save_checkpoint(tmp_path / "run.pt", controller, optimizer=torch.optim.Adam(model.parameters()))
    assert "parameter_groups" in caplog.text


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scaled_gradient_keeps_values_and_scales_all_gradients(compiled):
    def function(x):
        return (scaled_gradient(x, 0.3) ** 3).sum()

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    torch.testing.assert_close(called(x), (x**3).sum())
    (gradient,) = torch.autograd.grad(called(x), x)
    torch.testing.assert_close(gradient, 0.3 * 3 * x.detach() ** 2)
    assert scaled_gradient(x, 1.0) is x
    with torch.no_grad():
        assert scaled_gradient(x, 0.3) is x
