"""Devices are a choice point: plugins add some, and what is wrong with a description is said."""

from __future__ import annotations

import copy
import json
import re
import types
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn

from compress_core import Choice, CompressionConfig, ConfigError, PluginError, create_compressed_model
from compress_core.registry import Registry, default_registry, use_registry
from compress_quantization.profile_document import (
    POINT,
    OperatorDocument,
    ProfileDocument,
    SchemeDocument,
    check_document,
)
from compress_quantization.profiles import built_in_devices, load_profile
from tests.conftest import declared_entry_points
from tests.plugin_helpers import plugin

ROOT = Path(__file__).resolve().parents[4]
SECTION = {"compression": {"algorithm": "quantization"}}


def document(**changes):
    made = {
        "presets": "never",
        "half_range_weights": False,
        "schemes": {"a": {"bits": [8], "modes": ["symmetric"], "granularities": ["per_tensor"], "signed": True}},
        "operators": [{"kinds": ["linear"], "activations": ["a"], "weights": ["a"]}],
    }
    return {**made, **changes}


def registry_with(*choices):
    registry = Registry()
    registry.find_entry_points(declared_entry_points())
    registry.register(plugin(compress_choices=lambda self: list(choices)), "npus")
    return registry


def test_the_built_in_devices_pass_their_own_check():
    for choice in built_in_devices():
        assert check_document(choice.value) is None
        assert load_profile(choice.name).operators
        assert choice.description
    files = resources.files("compress_quantization") / "profiles"
    names = {json.loads(file.read_text())["device"] for file in files.iterdir() if file.name.endswith(".json")}
    assert names == {choice.name for choice in built_in_devices()} - {"ANY"}


def test_the_example_of_the_documentation_adds_a_device():
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    (code,) = (found for found in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "target_device" in found)
    assert len(code.strip().splitlines()) <= 26
    names: dict = {}
    exec(code, names)
    registry = Registry()
    registry.find_entry_points(declared_entry_points())
    module = types.ModuleType("my_npu")
    module.compress_choices = names["compress_choices"]
    registry.register(module, "my-npu")
    with use_registry(registry):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        config = {"target_device": "my-npu", **SECTION}
        controller, _ = create_compressed_model(net, config, init_loader=[torch.randn(2, 3, 4, 4)])
        assert [q.bits for q in controller.weight_quantizers.values()] == [4, 4]
        assert list(controller.non_weight_quantizers) == ["model/input 0|OUTPUT", "1|OUTPUT", "2|OUTPUT"]
        with pytest.raises(ConfigError, match=r"activations\.mode.*target_device my-npu offers for activations 8 bits"):
            create_compressed_model(
                nn.Sequential(nn.Conv2d(3, 4, 1)),
                {
                    "target_device": "my-npu",
                    "compression": {"algorithm": "quantization", "activations": {"mode": "asymmetric"}},
                },
                init_loader=[torch.randn(2, 3, 4, 4)],
            )


def test_the_config_lists_what_is_installed():
    with use_registry(registry_with(Choice("quantization.target_device", "my-npu", document()))):
        assert CompressionConfig.from_dict({"target_device": "my-npu", **SECTION}).root.target_device == "my-npu"
        schema = type(CompressionConfig.from_dict(SECTION).root).model_json_schema()
        offered = schema["properties"]["target_device"]["enum"]
        assert {"my-npu", "ANY", "CPU", "tensorrt", "xnnpack", "CPU_SPR"} <= set(offered)
        with pytest.raises(ConfigError, match=r"target_device: .*'my-npo'.*Did you mean 'my-npu'.*onnxruntime-cpu"):
            CompressionConfig.from_dict({"target_device": "my-npo", **SECTION})
    # Names are exact.
    for wrong, right in {"TensorRT": "tensorrt", "cpu": "CPU", "onnxruntime": "onnxruntime-cpu"}.items():
        with pytest.raises(ConfigError, match=f"Did you mean '{right}'"):
            CompressionConfig.from_dict({"target_device": wrong, **SECTION})


def test_a_config_can_be_read_where_quantization_is_not_installed():
    registry = Registry()
    registry.find_entry_points([point for point in declared_entry_points() if point.name != "quantization"])
    with use_registry(registry):
        config = {"target_device": "tensorrt", "compression": {"algorithm": "magnitude_sparsity"}}
        assert CompressionConfig.from_dict(config).root.target_device == "tensorrt"
    assert "tensorrt" in default_registry().choices(POINT.name)


@pytest.mark.parametrize("device", ["xnnpack", "tensorrt", "onnxruntime-cpu"])
def test_other_algorithms_do_not_mind_the_device(device):
    config = {"target_device": device, "compression": {"algorithm": "magnitude_sparsity"}}
    controller, _ = create_compressed_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert controller.algorithms.keys() == {"magnitude_sparsity"}


def wrong_documents():
    def changed(change):
        made = copy.deepcopy(document())
        change(made)
        return made

    operator = {"kinds": ["conv2d"], "activations": ["a"]}
    yield "a string", "must be a mapping, got str"
    yield document(operatorz=[]), "operatorz: unknown key.*Did you mean 'operators'"
    yield document(presets="sometimes"), "presets: input should be 'always', 'if_given' or 'never'"
    yield document(half_range_weights=1), "half_range_weights: input should be a valid boolean"
    yield document(schemes={}), "schemes: .*at least 1"
    yield document(unified_scales=["concats"]), "'concats' is no kind of operator. Did you mean 'concat'"
    yield document(operators=[{"kinds": ["lineal"], "activations": ["a"]}]), "Did you mean 'linear'"
    yield (
        document(operators=[{**operator, "activations": ["b"]}]),
        r"operators\.0\.activations: 'b' is not among the schemes",
    )
    yield document(operators=[operator, operator]), "'conv2d' is described twice"
    yield document(operators=[{**operator, "output": "needed"}]), r"output: .*'free', 'required' or 'decides'"
    yield document(operators=[{**operator, "fused_activations": ["relo"]}]), "'relo' is no activation function.*'relu'"
    yield document(operators=[{**operator, "fuses_with": ["conv"]}]), "fuses_with.*'conv' is no kind"
    yield document(operators=[{**operator, "inputs": [-1]}]), "inputs.*greater than or equal to 0"
    yield changed(lambda d: d["schemes"]["a"].update(bits=[16])), r"schemes\.a\.bits.*less than or equal to 8"
    yield changed(lambda d: d["schemes"]["a"].update(bits=["8"])), r"schemes\.a\.bits"
    yield changed(lambda d: d["schemes"]["a"].update(modes=["affine"])), r"schemes\.a\.modes"
    yield changed(lambda d: d["schemes"]["a"].update(smallest_scale=float("nan"))), r"smallest_scale"
    yield changed(lambda d: d["schemes"]["a"].update(modes=["asymmetric"])), "signed: means nothing without the mode"
    yield changed(lambda d: d.pop("presets")), "presets: is required"


@pytest.mark.parametrize(("wrong", "message"), list(wrong_documents()))
def test_what_is_wrong_with_a_description_is_said(wrong, message):
    with pytest.raises(PluginError, match=message):
        registry_with(Choice("quantization.target_device", "my-npu", wrong))


def test_everything_that_is_wrong_is_said_at_once():
    operators = [{"kinds": ["lineal"], "activations": ["b"]}]
    text = check_document(document(operators=operators, presets=1, extra=2))
    assert text is not None
    for part in ("operators.0.kinds", "'b' is not among", "presets", "extra: unknown key"):
        assert part in text


@pytest.mark.parametrize("model", [ProfileDocument, OperatorDocument, SchemeDocument])
def test_every_key_is_described(model):
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("device", "section", "path", "message"),
    [
        (
            "tensorrt",
            {"activations": {"mode": "asymmetric"}},
            "activations.mode",
            "offers for activations 8 bits symmetric per tensor",
        ),
        ("tensorrt", {"activations": {"signed": False}}, "activations.signed", "only has signed symmetric activations"),
        ("tensorrt", {"activations": {"per_channel": True}}, "activations.per_channel", "per tensor"),
        ("tensorrt", {"preset": "mixed"}, "preset", "tensorrt has no presets"),
        ("tensorrt", {"overflow_fix": "enable"}, "overflow_fix", "only with ANY, CPU, onnxruntime-cpu, openvino-cpu"),
        ("onnxruntime-cpu", {"weights": {"bits": 4}}, "weights.bits", "offers for weights 8 bits symmetric"),
        ("onnxruntime-cpu", {"weights": {"mode": "asymmetric"}}, "weights.mode", "offers for weights 8 bits symmetric"),
        ("onnxruntime-cpu", {"activations": {"per_channel": True}}, "activations.per_channel", "per tensor"),
        ("openvino-cpu", {"activations": {"bits": 4}}, "activations.bits", "8 bits"),
        ("xnnpack", {"weights": {"mode": "asymmetric"}}, "weights.mode", "offers for weights 8 bits symmetric"),
        ("xnnpack", {"overflow_fix": "first_layer_only"}, "overflow_fix", "no effect with target_device xnnpack"),
    ],
)
def test_what_a_device_does_not_offer_is_refused_with_the_remedy(device, section, path, message):
    config = {"target_device": device, "compression": {"algorithm": "quantization", **section}}
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        create_compressed_model(nn.Sequential(nn.Linear(4, 4)), config, init_loader=[torch.randn(2, 4)])
    assert caught.value.problems[0].path == f"compression.quantization.{path}"


def test_presets_of_xnnpack_are_followed_where_they_are_given():
    def modes(**section):
        config = {"target_device": "xnnpack", "compression": {"algorithm": "quantization", **section}}
        net = nn.Sequential(nn.Linear(4, 4))
        controller, _ = create_compressed_model(net, config, init_loader=[torch.randn(2, 4)])
        return {type(q).__name__.removesuffix("FakeQuantize") for q in controller.non_weight_quantizers.values()}

    assert modes() == modes(preset="mixed") == {"Asymmetric"}
    assert modes(preset="performance") == {"Symmetric"}
