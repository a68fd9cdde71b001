"""NNCF's names of all quantizers of MobileNetV3 (79) and RMNet (152) mean one quantizer each, in every list of scopes.

The names are written here as NNCF's graphs have them: the names of modules, and the calls counted for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from benchmarks.nncf_networks import MobileNetV3, RMNetClassifierCifar
from compress_core.config.scopes import ScopeFilter
from compress_core.trace import Trace, trace
from compress_quantization.config import QuantizationConfig
from compress_quantization.plan import QuantizationPlan
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile

_INPUT = "/nncf_model_input_0|OUTPUT"
_SQUEEZE = ("AdaptiveAvgPool2d[avgpool]/adaptive_avg_pool2d_0", "ReLU[activation]/relu_0")
_SQUEEZED = ("Hardsigmoid[scale_activation]/hardsigmoid_0", "__mul___0")


def mobilenet_names() -> Iterator[tuple[str, str]]:
    """Yields (NNCF's name, printed name) of the quantizers of activations."""
    yield _INPUT, "model/input 0|OUTPUT"
    top = "MobileNetV3/Sequential[features]"
    for number in (0, 12):
        name = f"{top}/Conv2dNormActivation[{number}]/Hardswish[2]/hardswish_0|OUTPUT"
        yield name, f"features.{number}.2|OUTPUT"
    for block in range(1, 12):
        kind, call = ("ReLU", "relu__0") if block < 4 else ("Hardswish", "hardswish_0")
        path, dotted = f"{top}/InvertedResidual[{block}]/Sequential[block]", f"features.{block}.block"
        position = 0
        for position in range(2 - (block == 1)):
            yield f"{path}/Conv2dNormActivation[{position}]/{kind}[2]/{call}|OUTPUT", f"{dotted}.{position}.2|OUTPUT"
        if block not in (2, 3):
            position += 1
            squeeze, inner = f"{path}/SqueezeExcitation[{position}]", f"{dotted}.{position}"
            for call in (*_SQUEEZE, *_SQUEEZED[:1]):
                yield f"{squeeze}/{call}|OUTPUT", f"{inner}.{call.partition('[')[2].partition(']')[0]}|OUTPUT"
            yield f"{squeeze}/__mul___0|OUTPUT", f"{inner}|OUTPUT"
        last = f"{path}/Conv2dNormActivation[{position + 1}]/NNCFBatchNorm2d[1]/batch_norm_0"
        yield f"{last}|OUTPUT", f"{dotted}.{position + 1}.1|OUTPUT"
        if block in (3, 5, 6, 8, 10, 11):
            yield f"{top}/InvertedResidual[{block}]/__iadd___0|OUTPUT", f"features.{block}|OUTPUT"
    yield "MobileNetV3/AdaptiveAvgPool2d[avgpool]/adaptive_avg_pool2d_0|OUTPUT", "avgpool|OUTPUT"
    yield "MobileNetV3/Sequential[classifier]/Hardswish[1]/hardswish_0|OUTPUT", "classifier.1|OUTPUT"


def rmnet_names() -> Iterator[tuple[str, str]]:
    """Yields (NNCF's name, printed name) of the quantizers of activations."""
    yield _INPUT, "model/input 0|OUTPUT"
    top = "RMNetClassifierCifar/RMNetBody[backbone]/Sequential[stages]"
    for name, call in (("NNCFBatchNorm2d[data_bn]", "batch_norm_0"), ("ReLU[relu1]", "relu__0")):
        dotted = name.partition("[")[2].rstrip("]")
        yield f"{top}/Sequential[stage_0]/{name}/{call}|OUTPUT", f"backbone.stages.stage_0.{dotted}|OUTPUT"
    for stage, blocks in ((1, 4), (2, 9), (3, 11), (4, 12)):
        for block in range(blocks):
            path = f"{top}/Sequential[stage_{stage}]/RMBlock[{block}]"
            dotted = f"backbone.stages.stage_{stage}.{block}"
            for turn in range(3):
                yield f"{path}/ELU[activation]/elu__{turn}|OUTPUT", f"{dotted}/elu#{turn}|OUTPUT"
            for name in ("expand_bn", *(["skip_conv_bn"] if stage > 1 and block == 0 else [])):
                yield f"{path}/NNCFBatchNorm2d[{name}]/batch_norm_0|OUTPUT", f"{dotted}.{name}|OUTPUT"
    yield "RMNetClassifierCifar/elu_0|OUTPUT", "model/elu#108|OUTPUT"
    yield "RMNetClassifierCifar/relu_0|OUTPUT", "model/relu#1|OUTPUT"


@dataclass
class Network:
    model: nn.Module
    traced: Trace
    names: dict[str, str]

    def plan(self, ignored: list[str] | None = None, **section: object) -> tuple[QuantizationPlan, Planner]:
        config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
        scopes = ScopeFilter(self.model, {f"ignored_scopes.{i}": entry for i, entry in enumerate(ignored or [])})
        planner = Planner(self.model, self.traced, config, load_profile("TRIAL"), scopes)
        scopes.check(planner.scope_candidates)
        return planner.plan(), planner


@pytest.fixture(scope="module", params=["MobileNetV3", "RMNet"])
def network(request) -> Network:
    make, names = {"MobileNetV3": (MobileNetV3, mobilenet_names), "RMNet": (RMNetClassifierCifar, rmnet_names)}[
        request.param
    ]
    model = make()
    return Network(model, trace(model, torch.ones(2, 3, 32, 32)), dict(names()))


def test_these_are_all_quantizers_of_activations(network):
    found, _ = network.plan()
    activations = {quantizer.name for quantizer in found.quantizers if quantizer.group == "activations"}
    assert set(network.names.values()) == activations
    assert len(network.names) == len(activations) in (79, 152)


def weight_names(network: Network) -> dict[str, str]:
    """Returns NNCF's name of each weight's quantizer -> its printed name, from the tree of modules."""
    found = {}
    for name, module in network.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            address, parent = type(network.model).__name__, network.model
            for part in name.split("."):
                parent = getattr(parent, part)
                prefix = "NNCF" if parent is module else ""
                address += f"/{prefix}{type(parent).__name__}[{part}]"
            call = "linear_0" if isinstance(module, nn.Linear) else "conv2d_0"
            found[f"{address}/{call}|WEIGHT"] = f"{name}|WEIGHT"
    return found


def test_each_name_gives_bits_to_one_quantizer(network):
    """Each list says who matched what, and what it did is seen at the quantizers."""
    names = network.names | weight_names(network)
    bits = {printed: 2 + number % 3 for number, printed in enumerate(names.values())}
    entries = [[bits[printed], name] for name, printed in names.items()]
    found, planner = network.plan(initializer={"precision": {"type": "manual", "bitwidth_per_scope": entries}})
    assert {quantizer.name: quantizer.spec.bits for quantizer in found.quantizers} == bits
    paths = [f"initializer.precision.bitwidth_per_scope.{number}" for number in range(len(entries))]
    used = planner.resolver.used
    assert [used[path] for path in paths] == [[printed] for printed in names.values()]


def test_each_name_overrides_one_quantizer(network):
    bits = {printed: 2 + number % 3 for number, printed in enumerate(network.names.values())}
    overrides = {name: {"bits": bits[printed]} for name, printed in network.names.items()}
    found, planner = network.plan(scope_overrides={"activations": overrides})
    assert {q.name: q.spec.bits for q in found.quantizers if q.group == "activations"} == bits
    used = planner.resolver.used
    assert {name: used[f"scope_overrides.activations.{name}"] for name in network.names} == {
        name: [printed] for name, printed in network.names.items()
    }


@pytest.mark.parametrize("kind", ["of the section", "of the activations"])
@pytest.mark.parametrize("is_reversed", [False, True], ids=["in order", "in reverse"])
def test_each_name_ignores_one_quantizer(network, kind, is_reversed):
    """The first entry that matches is named as the reason, so both orders together show that no other matches."""
    entries = list(network.names)[:: -1 if is_reversed else 1]
    if kind == "of the section":
        found, _ = network.plan(entries)
        prefix = "ignored_scopes"
    else:
        found, _ = network.plan(activations={"ignored_scopes": entries})
        prefix = "activations.ignored_scopes"
    assert {quantizer.group for quantizer in found.quantizers} == {"weights"}
    reasons = {f"{name}|OUTPUT": reason for name, reason in found.skipped.items()}
    expected = {network.names[entry]: f"ignored by {prefix}.{number}" for number, entry in enumerate(entries)}
    assert reasons == expected
