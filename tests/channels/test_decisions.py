"""Transforms that decide on the whole tensor are frozen before their weight is cut, or refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from compress_core.channels import ShrinkError
from compress_core.testing.fingerprint import fingerprint
from compress_core.transforms import (
    get_weight_transform,
    raw_parameter,
)
from tests.channels.following_helpers import (
    Clusters,
    DependentTopK,
    FreezingClusters,
    FreezingTopK,
    TopK,
    X,
    add,
    check_refused,
    check_strip_and_shrink,
    evaluated,
    pruned,
)


def test_top_k_that_cannot_be_frozen_is_refused_with_the_remedy():
    controller, model = pruned()
    add(model, DependentTopK(raw_parameter(model, "2.weight")))
    check_refused(controller, model, r"'mine' \(DependentTopK\) of '2.weight' depends on the whole .*freeze_decision")


@pytest.mark.parametrize("make", [TopK, lambda weight: Clusters()])
def test_what_does_not_say_that_it_depends_on_the_whole_tensor_is_found_by_the_proof(make):
    controller, model = pruned()
    add(model, make(raw_parameter(model, "2.weight")))
    check_refused(controller, model, "computes something else from '2' on", module="2")


@pytest.mark.parametrize("make", [FreezingTopK, lambda weight: FreezingClusters()])
def test_frozen_decisions_are_cut_with_the_weight(make):
    controller, model = pruned()
    transform = add(model, make(raw_parameter(model, "2.weight")))
    computed = get_computed(model)
    small = check_strip_and_shrink(controller, model)
    assert not transform.depends_on_whole_tensor
    kept = controller.shrink_plan["tensors"]["2.weight"]["kept"]["1"]
    assert torch.equal(get_computed(model), computed[:, kept])
    assert torch.equal(small[2].weight, computed[:, kept])


def get_computed(model):
    with torch.no_grad():
        return model.eval()[2].weight.clone()


def test_a_frozen_decision_goes_through_the_average_and_training():
    controller, model = pruned()
    transform = add(model, FreezingTopK(raw_parameter(model, "2.weight")))
    ema = copy.deepcopy(model)
    with torch.no_grad():
        get_weight_transform(ema, "2.weight", "mine").scores.copy_(torch.rand(4, 15))  # decides otherwise
    expected = evaluated(ema)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    controller.shrink(optimizer, ema)
    assert transform.training
    torch.testing.assert_close(evaluated(ema), expected, rtol=0, atol=1e-6)
    model.train()(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(pickle.loads(pickle.dumps(model)).eval()(X), model.eval()(X))


class NotFrozen(FreezingTopK):
    def freeze_decision(self, weight):
        self.register_buffer("frozen", self.mask())


class FrozenOtherwise(FreezingTopK):
    def freeze_decision(self, weight):
        super().freeze_decision(weight)
        self.frozen.logical_not_()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NotFrozen, "still depends on the whole tensor after freeze_decision"),
        (FrozenOtherwise, "computes something else after freeze_decision"),
    ],
)
def test_freezing_that_does_not_do_it_is_refused(cls, message):
    controller, model = pruned()
    add(model, cls(raw_parameter(model, "2.weight")))
    check_refused(controller, model, message)


def test_one_decision_for_two_weights_cannot_be_frozen():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    controller, model = pruned(model=model)
    transform = add(model, FreezingTopK(raw_parameter(model, "2.weight")))
    add(model, transform, "0.weight")
    before = fingerprint(model)
    with pytest.raises(ShrinkError, match="is a transform of other weights as well"):
        controller.shrink()
    assert fingerprint(model) == before


def test_layers_that_lose_nothing_need_no_declaration():
    model = nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 5), nn.ReLU(), nn.Linear(5, 4))
    controller, model = pruned(model=model)
    assert controller.pruned_module_groups == {0: ["0"], 1: ["2"]}
    controller.set_pruning_level({0: 0.4, 1: 0.0})
    untouched = add(model, DependentTopK(raw_parameter(model, "4.weight")), "4.weight")
    expected = evaluated(model)
    controller.shrink()
    assert untouched.depends_on_whole_tensor
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=1e-6)
