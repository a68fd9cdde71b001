"""Scopes and names: how a config means a quantizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.config.scopes import ScopeFilter
from compress_core.trace import trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.plan import QuantizationPlan
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile
from tests.placement_helpers import Block, plan

SEVERAL_WEIGHTS = {
    "lstm": (lambda: nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), 8),
    "gru": (lambda: nn.GRU(8, 4, batch_first=True), 2),
    "attention": (lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True), 2),
    "attention of other widths": (lambda: Unpacked(), 4),
}


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(8, 2, kdim=6, vdim=8, batch_first=True)

    def forward(self, x):
        return self.attention(x, self.key(x[..., :6]), x)[0]


@pytest.mark.parametrize("kind", SEVERAL_WEIGHTS)
def test_quantizers_of_layers_with_several_weights_have_names_of_their_own(kind):
    make, number = SEVERAL_WEIGHTS[kind]
    layer = make()
    if isinstance(layer, nn.MultiheadAttention):
        model = Block(lambda m, x: m.a(x, x, x)[0])
    else:
        model = Block(lambda m, x: m.a(x)[0] if isinstance(m.a, nn.RNNBase) else m.a(x))
    model.a = layer
    found = [q.name for q in plan(model, torch.ones(2, 5, 8)).quantizers]
    assert len(set(found)) == len(found)
    weights = [name for name in found if name.endswith("|WEIGHT")]
    assert len(weights) == number
    chosen = weights[0].removesuffix("|WEIGHT")
    bits = {q.name: q.spec.bits for q in plan(model, torch.ones(2, 5, 8), **of_bits(chosen)).quantizers}
    assert [name for name, value in bits.items() if value == 4] == [weights[0]]


def of_bits(name):
    return {
        "device": "TRIAL",
        "initializer": {"precision": {"type": "manual", "bitwidth_per_scope": [[4, f"{name}|WEIGHT"]]}},
    }


class Scoped(nn.Module):
    """A model with every kind of place that a scope can name."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.branch = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.features(x)
        x = x + self.branch(x)
        x = F.relu(x + 1.0)
        return self.head(self.pool(x).flatten(1))


def names(scopes=None, **section):
    model = Scoped()
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    recorded = trace(model, torch.ones(2, 3, 4, 4), training=True)
    scope_filter = ScopeFilter(model, {str(i): scope for i, scope in enumerate(scopes or [])})
    planner = Planner(model, recorded, config, load_profile("ANY"), scope_filter)
    scope_filter.check(planner.scope_candidates)
    return {quantizer.name for quantizer in planner.plan().quantizers}


EVERYTHING = {
    "features.0|WEIGHT",
    "branch|WEIGHT",
    "head|WEIGHT",
    "model/input 0|OUTPUT",
    "features.1|OUTPUT",
    "branch|OUTPUT",
    "model/relu#1|OUTPUT",
    "pool|OUTPUT",
}


@pytest.mark.parametrize(
    ("scope", "removed"),
    [
        ("head", {"head|WEIGHT", "pool|OUTPUT"}),
        ("Scoped/NNCFLinear[head]/linear_0", {"head|WEIGHT", "pool|OUTPUT"}),
        ("features", {"features.0|WEIGHT", "model/input 0|OUTPUT"}),
        ("pool", {"model/relu#1|OUTPUT"}),
        # The quantizer that the addition shared with the branch now stands at the input of the branch alone.
        ("Scoped/__add___0", {"branch|OUTPUT", "features.1|OUTPUT"}),
        ("Scoped/AvgPool2d[pool]/avg_pool2d_0", {"model/relu#1|OUTPUT"}),
        ("{re}Linear", {"head|WEIGHT", "pool|OUTPUT"}),
    ],
)
def test_an_ignored_scope_removes_the_weight_and_the_input_of_a_layer(scope, removed):
    assert names() == EVERYTHING
    assert EVERYTHING - names([scope]) == removed


def test_regular_expressions_find_functions_under_all_their_names():
    assert names(["{re}__add___0$"]) == names(["Scoped/__add___0"])
    assert names(["{re}__add__"]) == names(["{re}^add$"])


def test_a_scope_without_a_match_is_an_error():
    with pytest.raises(ConfigError, match="'Scoped/__add___7' matches no layer"):
        names(["Scoped/__add___7"])


@pytest.mark.parametrize(
    ("entry", "quantizer"),
    [
        ("pool|OUTPUT", "pool|OUTPUT"),
        ("Scoped/AvgPool2d[pool]/avg_pool2d_0|OUTPUT", "pool|OUTPUT"),
        ("Scoped/Sequential[features]/ReLU[1]/relu_0|OUTPUT", "features.1|OUTPUT"),
        ("model/input 0|OUTPUT", "model/input 0|OUTPUT"),
        ("/nncf_model_input_0|OUTPUT", "model/input 0|OUTPUT"),
        ("model/relu#1|OUTPUT", "model/relu#1|OUTPUT"),
        ("{re}pool\\|OUTPUT", "pool|OUTPUT"),
    ],
)
def test_bits_can_be_given_to_quantizers_as_they_are_printed_or_as_nncf_does(entry, quantizer):
    precision = {"bitwidth_per_scope": [[4, entry]]}
    found = plan(Scoped(), torch.ones(2, 3, 4, 4), device="TRIAL", initializer={"precision": precision})
    assert {q.name: q.spec.bits for q in found.quantizers if q.spec.bits != 8} == {quantizer: 4}


class AddsTwice(nn.Module):
    def forward(self, x):
        return (x + 1) * x + x


def test_the_printed_name_of_a_call_means_that_call_alone():
    model = nn.Sequential(AddsTwice(), AddsTwice(), nn.Conv2d(3, 3, 1))
    everything = [q.name for q in plan(model, torch.ones(2, 3, 4, 4)).quantizers]
    assert {"0/torch.Tensor.mul#0|OUTPUT", "1/torch.Tensor.mul#0|OUTPUT"} < set(everything)
    for name in [name for name in everything if "#" in name]:
        precision = {"bitwidth_per_scope": [[4, name]]}
        found = plan(model, torch.ones(2, 3, 4, 4), device="TRIAL", initializer={"precision": precision})
        assert [q.name for q in found.quantizers if q.spec.bits != 8] == [name]


def test_a_layer_whose_function_another_module_calls_goes_by_its_own_name():
    model = Block(lambda m, x: m.attention(x, x, x, need_weights=False)[0])
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    everything = {q.name for q in plan(model, x).quantizers}
    left = {q.name for q in plan(model, x, activations={"ignored_scopes": ["attention.out_proj"]}).quantizers}
    assert everything - left == {"attention/scaled_dot_product_attention#0|OUTPUT"}
    override = {"scope_overrides": {"activations": {"attention.out_proj": {"bits": 4}}}}
    found = plan(model, x, device="TRIAL", **override).quantizers
    assert [q.name for q in found if q.spec.bits == 4] == ["attention/scaled_dot_product_attention#0|OUTPUT"]


def plan_without(model: nn.Module, *inputs: torch.Tensor, ignored: str) -> QuantizationPlan:
    config = QuantizationConfig.model_validate({"algorithm": "quantization"})
    recorded = trace(model, inputs if len(inputs) > 1 else inputs[0], training=True)
    scopes = ScopeFilter(model, {"ignored_scopes.0": ignored})
    planner = Planner(model, recorded, config, load_profile("ANY"), scopes)
    scopes.check(planner.scope_candidates)
    return planner.plan()


class AddsInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = AddsTwice(), nn.Conv2d(3, 3, 1)

    def forward(self, x, y):
        return self.last(self.first(x) + y)


@pytest.mark.parametrize("section", [True, False])
@pytest.mark.parametrize(
    ("entry", "removed"),
    [
        ("model/torch.Tensor.add#2", "model/torch.Tensor.add#2|OUTPUT"),
        ("first/torch.Tensor.add#1 input 1", "first/torch.Tensor.add#1 input 1|INPUT0"),
        ("first/torch.Tensor.mul#0", "first/torch.Tensor.mul#0|OUTPUT"),
        ("model/input 1", "model/input 1|OUTPUT"),
        ("/nncf_model_input_1", "model/input 1|OUTPUT"),
        *((name, name) for name in ("first|OUTPUT", "first/torch.Tensor.mul#0|OUTPUT", "model/input 1|OUTPUT")),
        ("last|WEIGHT", "last|WEIGHT"),
    ],
)
def test_quantizers_can_be_ignored_by_their_own_name(entry, removed, section):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    everything = {q.name for q in plan(model, *inputs).quantizers}
    if section:
        group = "weights" if "WEIGHT" in entry else "activations"
        found = plan(model, *inputs, **{group: {"ignored_scopes": [entry]}})
    else:
        found = plan_without(model, *inputs, ignored=entry)
    assert everything - {q.name for q in found.quantizers} == {removed}
    assert "ignored by" in str(found.skipped)


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("first/torch.Tensor.mul#0", "first/torch.Tensor.mul#0|OUTPUT"),
        ("first|OUTPUT", "first|OUTPUT"),
        ("model/input 1|OUTPUT", "model/input 1|OUTPUT"),
        ("/nncf_model_input_1", "model/input 1|OUTPUT"),
        ("last|WEIGHT", "last|WEIGHT"),
    ],
)
def test_settings_can_be_overridden_for_quantizers_by_their_own_name(scope, changed):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    override = {"bits": 4, "mode": "asymmetric", "initializer": {"range": {"type": "percentile"}}}
    group = "weights" if "WEIGHT" in scope else "activations"
    found = plan(model, *inputs, device="TRIAL", scope_overrides={group: {scope: override}})
    settings = {q.name: (q.spec.bits, q.spec.mode, q.initial_range.type) for q in found.quantizers}
    assert settings.pop(changed) == (4, "asymmetric", "percentile")
    assert all(bits == 8 and mode == "symmetric" and kind != "percentile" for bits, mode, kind in settings.values())


def test_an_override_that_a_quantizer_cannot_have_is_refused_with_its_path():
    with pytest.raises(ConfigError, match=r"scope_overrides.activations.first\|OUTPUT.bits: .*4 bits"):
        plan(AddsInputs(), *torch.ones(2, 2, 3, 4, 4), scope_overrides={"activations": {"first|OUTPUT": {"bits": 4}}})


def test_an_override_for_what_demands_nothing_is_not_taken_for_used():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    with pytest.raises(ConfigError, match="the scope '1' matches no quantizer"):
        plan(model, torch.ones(2, 3, 4, 4), device="TRIAL", scope_overrides={"activations": {"1": {"bits": 4}}})


@pytest.mark.parametrize("scope", [r"{re}Block/ELU\[act\]", "Block/ELU[act]/elu_0"])
def test_an_override_of_nncf_for_what_demands_nothing_is_left_with_a_warning(scope, caplog):
    """NNCF's own document of RMNet has one; what it says is how to mean the quantizer behind the operator."""
    model = Block(lambda m, x: m.b(m.act(m.a(x))))
    model.act = nn.ELU()
    x = torch.ones(2, 4, 4, 4)
    override = {"bits": 4}
    found = plan(model, x, device="TRIAL", scope_overrides={"activations": {scope: override}})
    assert {q.spec.bits for q in found.quantizers} == {8}
    (record,) = [one for one in caplog.records if "has no effect, as in NNCF" in one.getMessage()]
    meant = record.getMessage().partition("('")[2].partition("' would")[0]
    found = plan(model, x, device="TRIAL", scope_overrides={"activations": {meant: override}})
    assert [q.name for q in found.quantizers if q.spec.bits == 4] == ["act|OUTPUT"]
    with pytest.raises(ConfigError, match="matches no quantizer"):
        plan(model, x, device="TRIAL", scope_overrides={"activations": {scope.replace("act", "acc"): override}})


def test_names_of_calls_mean_the_calls_of_that_module():
    class Inner(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.tanh(x))

    model = Block(lambda m, x: m.last(torch.tanh(m.inner(m.inner(x)))))
    model.inner, model.last = Inner(nn.Linear(4, 4)), nn.Linear(4, 4)
    precision = {"bitwidth_per_scope": [[4, "Block/tanh_0|OUTPUT"]]}
    found = plan(model, torch.ones(2, 4), device="TRIAL", initializer={"precision": precision})
    assert [q.name for q in found.quantizers if q.spec.bits == 4] == ["model/torch.tanh#2|OUTPUT"]


def test_what_is_ignored_twice_is_no_error():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), torch.ones(2, 3, 4, 4)
    config = QuantizationConfig.model_validate(
        {
            "algorithm": "quantization",
            "weights": {"ignored_scopes": ["0", "0|WEIGHT"]},
            "activations": {"ignored_scopes": ["0"]},
        }
    )
    scopes = ScopeFilter(model, {"ignored_scopes.0": "0", "ignored_scopes.1": "0|WEIGHT"})
    found = Planner(model, trace(model, x), config, load_profile("ANY"), scopes).plan()
    assert {q.name for q in found.quantizers} == {"1|WEIGHT", "0|OUTPUT"}


def test_problems_of_planning_have_paths_in_the_document():
    section = {"algorithm": "quantization", "weights": {"ignored_scopes": ["1|WEIGHT"]}}
    document = {"input_info": {"sample_size": [2, 3, 4, 4]}, "compression": section}
    with pytest.raises(ConfigError) as caught:
        create_compressed_model(nn.Sequential(nn.Conv2d(3, 3, 1)), document)
    assert caught.value.problems[0].path == "compression.quantization.weights.ignored_scopes.0"


@pytest.mark.parametrize("entry", ["model/torch.Tensor.add#3", "/nncf_model_input_2", "model/input 9"])
def test_a_quantizer_that_there_is_not_cannot_be_ignored(entry):
    model, inputs = AddsInputs(), [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    with pytest.raises(ConfigError, match=f"'{entry}' is nothing that would be quantized"):
        plan_without(model, *inputs, ignored=entry)
    with pytest.raises(ConfigError, match=f"'{entry}' matches no quantizer"):
        plan(model, *inputs, activations={"ignored_scopes": [entry]})


class InPlace(nn.Module):
    """Activations in place, as modules and functions, next to others that are not."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ELU(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.last(self.body(x))
        x = self.head(self.relu(x))
        x = self.head(self.relu(x))
        return self.head(F.relu(F.relu(x, inplace=True).mul(-1)))


IN_PLACE = {
    "InPlace/Sequential[body]/ReLU[1]/relu__0|OUTPUT": "body.1|OUTPUT",
    "InPlace/Sequential[body]/ELU[3]/elu__0|OUTPUT": "body.3|OUTPUT",
    "InPlace/Sequential[last]/ReLU6[1]/hardtanh_0|OUTPUT": "last.1|OUTPUT",
    "InPlace/ReLU[relu]/relu__1|OUTPUT": "model/relu#2|OUTPUT",
    "InPlace/relu_0|OUTPUT": "model/relu#4|OUTPUT",
}


@pytest.mark.parametrize(("entry", "quantizer"), IN_PLACE.items())
def test_a_name_of_nncf_means_the_same_in_all_places(entry, quantizer):
    example = torch.ones(2, 3, 4, 4)
    everything = {q.name: q.spec.bits for q in plan(InPlace(), example, device="TRIAL").quantizers}
    ignored = {"ignored_scopes": [entry]}
    four = {
        "scope_overrides": {"activations": {entry: {"bits": 4}}},
        "initializer": {"precision": {"bitwidth_per_scope": [[4, entry]]}},
    }
    for section in ({"activations": ignored}, *({key: value} for key, value in four.items())):
        found = {q.name: q.spec.bits for q in plan(InPlace(), example, device="TRIAL", **section).quantizers}
        changed = {name for name in everything if found.get(name) != everything[name]}
        assert changed == {name for name in everything if name.startswith(quantizer.partition("|")[0])}, section
        assert len(changed) == 1
    left = {q.name for q in plan_without(InPlace(), example, ignored=entry).quantizers}
    assert {q.name for q in plan(InPlace(), example).quantizers} - left == changed


def test_a_unified_quantizer_has_the_names_of_all_its_places():
    model = Block(lambda m, x: m.c(m.a(x) + m.b(x)))
    model.a, model.b, model.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    for name in ("a", "b"):
        precision = {"bitwidth_per_scope": [[4, f"Block/NNCFConv2d[{name}]/conv2d_0|OUTPUT"]]}
        found = plan(model, torch.ones(2, 3, 4, 4), device="NPU", initializer={"precision": precision})
        assert [q.name for q in found.quantizers if q.spec.bits == 4] == ["a|OUTPUT"]


def test_an_operator_whose_inputs_are_not_quantized_is_named_with_what_to_write():
    entry = "InPlace/Sequential[body]/ReLU[1]/relu__0"
    with pytest.raises(ConfigError, match=r"relu__0\|OUTPUT' would mean the quantizers behind it"):
        plan(InPlace(), torch.ones(2, 3, 4, 4), activations={"ignored_scopes": [entry]})
