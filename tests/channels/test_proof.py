"""Smaller tensors, the proof that nothing else has changed, and costs."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import StateError
from compress_core.channels import (
    Certificate,
    Costs,
    InputSpec,
    Shrinkage,
    ShrinkError,
    channel_groups,
    input_specs,
    operation_costs,
    parameter_costs,
    prove,
    shrinkage,
)
from compress_core.trace import Example, trace
from tests.channel_helpers import groups_of, mask
from tests.channels.small_models import Function, normal


def small():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    trace_of = trace(model.eval(), normal(2, 3, 5, 5))
    (group,) = channel_groups(trace_of).prunable
    return model, group, input_specs(trace_of.forwards[0])


def test_parameters_stay_objects_and_gradients_shrink():
    model, group, _ = small()
    model(normal(2, 3, 5, 5)).sum().backward()
    weight, gradient = model[0].weight, model[0].weight.grad.clone()
    values = weight.detach().clone()
    shrinkage(model, [(group, {0, 2})]).apply(model)
    assert model[0].weight is weight
    assert torch.equal(weight, values[[1, 3]])
    assert torch.equal(weight.grad, gradient[[1, 3]])
    assert model[1].running_mean.shape == (2,)


def test_memory_format_is_kept():
    model, group, _ = small()
    model.to(memory_format=torch.channels_last)
    shrinkage(model, [(group, {0})]).apply(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()


def test_plan_goes_through_json():
    model, group, _ = small()
    plan = shrinkage(model, [(group, {1})])
    assert plan.kept["2.weight"] == {1: [0, 2, 3]}
    again = Shrinkage.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    other, _, _ = small()
    again.apply(other)
    assert other[2].weight.shape == (5, 3, 1, 1)
    assert Shrinkage.from_dict(Shrinkage().to_dict()) == Shrinkage()


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("format"),
        lambda saved: saved.update(format=2),
        lambda saved: saved.update(tensors=[]),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [3, 1]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [0, 0]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [0, 4]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": [-1, 2]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"1": []}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"7": [0]}),
        lambda saved: saved["tensors"]["2.weight"]["kept"].update({"x": [0]}),
        lambda saved: saved["tensors"]["2.weight"].update(shape=None),
    ],
)
def test_broken_plan(change):
    model, group, _ = small()
    saved = shrinkage(model, [(group, {1})]).to_dict()
    change(saved)
    with pytest.raises(StateError, match=r"^plan\.(format|tensors)"):
        Shrinkage.from_dict(saved)


def test_plan_for_another_model():
    model, group, _ = small()
    plan = shrinkage(model, [(group, {1})])
    with pytest.raises(StateError, match=r"no tensor '0\.weight'"):
        plan.apply(nn.ReLU())
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"shape \(6, 3, 3, 3\), expected \(4, 3, 3, 3\)"):
        plan.apply(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_one_shrinkage_after_another():
    model, group, _ = small()
    once = copy.deepcopy(model)
    first = shrinkage(model, [(group, {0})])
    first.apply(model)
    (smaller,) = groups_of(model, normal(1, 3, 5, 5)).prunable
    second = shrinkage(model, [(smaller, {1})])
    second.apply(model)
    both = first.then(second)
    assert both.kept["0.weight"] == {0: [1, 3]}
    both.apply(once)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True))
    assert first.then(Shrinkage()) == first
    assert Shrinkage().then(first) == first


def test_proof_fails_when_channels_matter():
    model, group, specs = small()
    with pytest.raises(ShrinkError, match="computes something else from '2'") as raised:
        prove(model, shrinkage(model, [(group, {0})]), specs)
    assert raised.value.module == "2"
    assert not raised.value.reference


def test_proof_leaves_the_model_and_random_numbers_alone():
    model, group, specs = small()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mask(model, [(group, set())])
    prove(model, shrinkage(model, []), specs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_proof_names_the_module_with_a_size_in_its_code():
    def forward(self, x):
        return x.reshape(len(x), 6, -1).flatten(1)

    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Function(forward)), nn.Linear(6, 2))
    found_trace = trace(model, normal(2, 3))
    (group,) = channel_groups(found_trace).prunable
    pairs = [(group, {0, 1})]
    mask(model, pairs)
    with pytest.raises(ShrinkError, match=r"fails in '1\.0' \(eval mode\).*A size is written in its code") as raised:
        prove(model, shrinkage(model, pairs), input_specs(found_trace.forwards[0]))
    assert raised.value.module == "1.0"


def test_proof_of_a_model_that_draws_random_numbers_anywhere():
    def forward(self, x):
        factor = random.random() + np.random.rand() + torch.rand(()) if self.training else 1.0
        return self.b(self.a(x)) * factor

    model = Function(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    found_trace = trace(model.eval(), normal(2, 3))
    pairs = [(channel_groups(found_trace).prunable[0], {1})]
    mask(model, pairs)
    states = random.getstate(), np.random.get_state()[1].tolist()
    assert prove(model, shrinkage(model, pairs), input_specs(found_trace.forwards[0])).train_difference is not None
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_proof_of_a_model_that_does_not_run_on_random_inputs():
    def forward(self, x):
        if float(x.sum()) != 0:
            raise ValueError("only zeros")
        return self.b(self.a(x))

    model = Function(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    found_trace = trace(model, torch.zeros(2, 3))
    (group,) = channel_groups(found_trace).prunable
    with pytest.raises(ShrinkError, match=r"does not run on inputs like those.*only zeros") as raised:
        prove(model, shrinkage(model, [(group, {0})]), input_specs(found_trace.forwards[0]))
    assert raised.value.reference


def test_dropout_and_nested_inputs():
    def forward(self, given, *, scale):
        return self.b(self.drop(self.a(given["x"][0]))) * scale

    class Keyword(Function):
        def forward(self, given, *, scale):
            return self._forward(self, given, scale=scale)

    model = Keyword(forward, a=nn.Linear(3, 6), drop=nn.Dropout(0.5), b=nn.Linear(6, 2))
    found_trace = trace(model, Example.of({"x": [normal(4, 3)]}, scale=normal(4, 1)))
    (group,) = channel_groups(found_trace).prunable
    specs = input_specs(found_trace.forwards[0])
    assert [InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) for spec in specs] == specs
    mask(model, [(group, {1})])
    certificate = prove(model, shrinkage(model, [(group, {1})]), specs)
    assert certificate.train_difference is not None
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_costs_by_hand_and_through_json():
    model, group, _ = small()
    found = groups_of(model, normal(2, 3, 5, 5))
    (group,) = found.prunable
    operations, parameters = operation_costs(found, [group], 2), parameter_costs(model, [group])
    for left in range(5):
        assert operations.of([left]) == 2 * 9 * (3 * 9 * left + left * 5)
        assert parameters.of([left]) == left * (27 + 1 + 2 + 5) + 5
    for costs in (operations, parameters):
        again = Costs.from_dict(json.loads(json.dumps(costs.to_dict())), [group.size])
        assert [again.of([left]) for left in range(5)] == [costs.of([left]) for left in range(5)]
    assert parameter_costs(model, []).of([]) == sum(p.numel() for p in model.parameters())
