"""A name of a quantizer means the same in every list of scopes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ConfigError
from compress_core.config.scopes import ScopeFilter
from compress_core.trace import trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile


class AddsOne(nn.Module):
    """A module whose result is one of its calls, with a layer below it that has a quantizer of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.inner(x)) * x + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = AddsOne(), nn.Sequential(AddsOne(), nn.Conv2d(3, 3, 1))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


MODEL = Net()
TRACE = trace(MODEL, torch.ones(2, 3, 4, 4))
FIRST = {"first|OUTPUT", "first.act|OUTPUT", "first/torch.Tensor.mul#0|OUTPUT"}
WEIGHTS = {"first.inner|WEIGHT", "second.0.inner|WEIGHT", "second.1|WEIGHT", "last|WEIGHT"}


def planned(ignored=(), **section):
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    scopes = ScopeFilter(MODEL, {f"ignored_scopes.{i}": entry for i, entry in enumerate(ignored)})
    planner = Planner(MODEL, TRACE, config, load_profile("TRIAL"), scopes)
    scopes.check(planner.scope_candidates)
    return {quantizer.name: quantizer.spec.bits for quantizer in planner.plan().quantizers}


EVERYTHING = planned()


def changed_by(kind: str, entry: str, group: str) -> set[str]:
    """Returns the quantizers that are another or gone when the entry stands in this list."""
    sections = {
        "bitwidth_per_scope": {"initializer": {"precision": {"type": "manual", "bitwidth_per_scope": [[4, entry]]}}},
        "scope_overrides": {"scope_overrides": {group: {entry: {"bits": 4}}}},
        "ignored_scopes of the group": {group: {"ignored_scopes": [entry]}},
        "ignored_scopes": {"ignored": [entry]},
    }
    found = planned(**sections[kind])
    assert found.keys() <= EVERYTHING.keys()
    return {name for name, bits in EVERYTHING.items() if found.get(name) != bits}


KINDS = ["bitwidth_per_scope", "scope_overrides", "ignored_scopes of the group", "ignored_scopes"]
MEANINGS = {
    # The quantizer behind `first`, and not those below it.
    "first|OUTPUT": {"first|OUTPUT"},
    "Net/AddsOne[first]/__add___0|OUTPUT": {"first|OUTPUT"},
    "Net/OtherClass[first]/__mul___0|OUTPUT": {"first/torch.Tensor.mul#0|OUTPUT"},
    "first.act|OUTPUT": {"first.act|OUTPUT"},
    "model/input 0|OUTPUT": {"model/input 0|OUTPUT"},
    "/nncf_model_input_0|OUTPUT": {"model/input 0|OUTPUT"},
    "last|WEIGHT": {"last|WEIGHT"},
    "Net/NNCFConv2d[last]/conv2d_0|WEIGHT": {"last|WEIGHT"},
    "Net/NNCFConv2d[last]|WEIGHT": {"last|WEIGHT"},
    # All of them have a glob, or a regular expression with the port.
    "first*|OUTPUT": FIRST,
    "*|WEIGHT": WEIGHTS,
    "second.*|WEIGHT": {"second.0.inner|WEIGHT", "second.1|WEIGHT"},
    r"{re}^first.*\|OUTPUT": FIRST,
    r"{re}inner\|WEIGHT$": {"first.inner|WEIGHT", "second.0.inner|WEIGHT"},
    r"{re}^Net/AddsOne\[first\]/ReLU\[act\]/relu_0\|OUTPUT$": {"first.act|OUTPUT"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", MEANINGS)
def test_a_name_means_the_same_quantizers_in_every_list(entry, kind):
    group = "weights" if "WEIGHT" in entry else "activations"
    assert changed_by(kind, entry, group) == MEANINGS[entry]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ["second|WEIGHT", "first.inner|OUTPUT", "first.inner|INPUT3", r"{re}firs\|OUTPUT"])
def test_a_name_of_no_quantizer_is_refused_in_every_list(entry, kind):
    group = "weights" if "WEIGHT" in entry else "activations"
    with pytest.raises(ConfigError) as caught:
        changed_by(kind, entry, group)
    assert entry in str(caught.value)
    if entry == "second|WEIGHT":
        assert "'second.*|WEIGHT' means all below 'second'" in str(caught.value)


@pytest.mark.parametrize("kind", ["scope_overrides", "ignored_scopes of the group", "ignored_scopes"])
def test_a_regular_expression_that_finds_operators_means_their_inputs(kind):
    """Names of quantizers that it would find as well, because the port comes later, are not meant."""
    assert changed_by(kind, "{re}^last", "activations") - WEIGHTS == changed_by(kind, "last", "activations") - WEIGHTS
