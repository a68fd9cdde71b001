"""The contract by the conformance kit on a model with the operator, the choices against numbers."""

import pytest
import torch
from compress_extras import ScaleShift, cosine, hoyer, scale_shift
from torch import nn

from compress_core import create_compressed_model
from compress_core.channels import channel_groups
from compress_core.testing import Case, conformance_checks
from compress_core.trace import trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), ScaleShift(16), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    return model


def pruning(**params):
    params |= {"prune_first_conv": True, "multiple_of": 1, "filter_importance": "hoyer", "schedule": "cosine"}
    section = {"algorithm": "filter_pruning", "pruning_init": 0.25, "params": params}
    return {"input_info": {"sample_size": [4, 3, 8, 8]}, "compression": section}


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
def test_contract(check):
    check(Case(network, (X,), pruning(), strip_tolerance=1e-5))


def test_hoyer_counts_weights():
    filters = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.0, 2.0, -2.0, 0.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert hoyer(filters).tolist() == pytest.approx([4, 2, 1, 0])
    assert hoyer(filters * 1000).tolist() == pytest.approx([4, 2, 1, 0])


def test_cosine_is_slow_at_both_ends():
    level = cosine(0.2, 0.6, 6)
    assert [level(time) for time in (0, 2, 3, 4, 6, 9)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    assert cosine(0.2, 0.6, 0)(0) == 0.6


def test_the_schedule_is_what_pruning_follows():
    controller, _ = create_compressed_model(network(), pruning(pruning_target=0.75, pruning_steps=5))
    levels = []  # the last of five epochs has the target
    for _ in range(6):
        controller.scheduler.epoch_step()
        levels.append(controller.statistics().filter_pruning.requested_level)
    assert levels == pytest.approx([cosine(0.25, 0.75, 4)(epoch) for epoch in range(6)])


def test_the_operator_and_its_gradients():
    x, scale, shift = X[:1].double(), torch.randn(3).double(), torch.randn(3).double()
    expected = x * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
    torch.testing.assert_close(scale_shift(x, scale, shift), expected, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(scale_shift, (x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()))
    assert torch.autograd.gradcheck(scale_shift, (x[:, :, :2, :2], scale, shift))


def test_scale_and_shift_belong_to_the_channels_before_them():
    model = network()
    groups = channel_groups(trace(model, X)).groups
    members = {(member.parameter, member.dim) for group in groups for member in group.members}
    assert {("0.weight", 0), ("0.bias", 0), ("1.scale", 0), ("1.shift", 0), ("3.weight", 1)} <= members


def test_channels_go_through_the_operator():
    model = network()
    with torch.no_grad():
        for index in (2, 5, 7, 11):  # filters of a single weight
            model[0].weight[index] = 0
            model[0].weight[index, 0, 0, 0] = 10
    controller, model = create_compressed_model(model, pruning())
    stay = [index for index in range(16) if index not in (2, 5, 7, 11)]
    expected = model.eval()(X)
    plain = controller.strip()
    assert plain[1].scale.shape == plain[1].shift.shape == (12,)
    assert torch.equal(plain[1].scale, dict(model.named_parameters())["1.scale"][stay])
    torch.testing.assert_close(plain.eval()(X), expected, rtol=1e-5, atol=1e-6)
