"""Operators whose inputs share one quantizer: groups that the config names, and what NPUs want."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.transforms import activation_transforms
from tests.onnx_helpers import File
from tests.placement_helpers import Block, places, plan


def residual(m, x):
    y = m.relu(m.a(x))
    return m.c(m.b(y) + y)


class Residual(Block):
    def __init__(self):
        super().__init__(residual)
        self.a = nn.Conv2d(3, 4, 1)


def unified(*groups, model=None, inputs=None, device="ANY", activations=None, **section):
    activations = {"unified_scale_ops": list(groups), **(activations or {})}
    model = model or Block(residual)
    inputs = torch.ones(2, 4, 8, 8) if inputs is None else inputs
    return plan(model, inputs, device=device, activations=activations, **section)


def refused(*groups, **options):
    with pytest.raises(ConfigError) as caught:
        unified(*groups, **options)
    return {problem.path: problem.message for problem in caught.value.problems}


SEPARATE = [["model: input 0"], ["relu: output"], ["b: output"], ["model: torch.Tensor.add#0 output"]]


def test_without_groups_each_has_its_own():
    assert places(plan(Block(residual), torch.ones(2, 4, 8, 8))) == SEPARATE


@pytest.mark.parametrize(
    "name",
    [
        "add",
        "ad*",
        "{re}^add$",
        "Block/__add___0",
        "{re}Block/__add___",
        "model/torch.Tensor.add#0",
    ],
)
def test_inputs_of_one_operator_by_whatever_name(name):
    found = places(unified([name]))
    assert found == [["model: input 0"], ["relu: output", "b: output"], ["model: torch.Tensor.add#0 output"]]


@pytest.mark.parametrize(
    "group",
    [
        ["a", "c"],
        ["a.conv2d", "c.conv2d"],
        ["Block/NNCFConv2d[a]/conv2d_0", "Block/Conv2d[c]/conv2d_0"],
        ["a/conv2d#0", "c/conv2d#0"],
        ["{re}^[ac]\\."],
    ],
)
def test_inputs_of_several_operators(group):
    found = places(unified(group))
    assert found == [["model: input 0", "model: torch.Tensor.add#0 output"], ["relu: output"], ["b: output"]]


def test_groups_that_share_a_quantizer_become_one():
    # Both read what the relu returns.
    assert places(unified(["a", "b"], ["add"])) == [
        ["model: input 0", "relu: output", "b: output"],
        ["model: torch.Tensor.add#0 output"],
    ]


def test_quantizers_that_have_moved_up_are_found():
    def rest(m, x):
        y = torch.cat([m.a(x), m.b(x)], 2)
        return m.c(F.max_pool2d(y, 2).flip(3)) + y.mean((2, 3), keepdim=True)

    separate = plan(Block(rest), torch.ones(2, 4, 8, 8), device="TRIAL")
    assert ["a: output"] in places(separate)
    assert ["b: output"] in places(separate)
    # Behind a concatenation, all of its parts; TRIAL does not make these one by itself.
    (shared,) = [p for p in places(unified(["c", "a"], model=Block(rest), device="TRIAL")) if "a: output" in p]
    assert shared == ["model: input 0", "a: output", "b: output"]


def test_a_quantizer_for_some_readers_only_is_found():
    def rest(m, x):
        y = m.a(x)
        return m.b(y), m.c(x), y

    expected = ["model: input 0", "b: torch.nn.functional.conv2d#0 input 0"]
    assert places(unified(["b", "c"], model=Block(rest))) == [expected]


def test_operators_of_several_examples_share_one():
    def rest(m, x):
        return m.c(m.a(x) if x.shape[2] == 8 else m.b(x))

    examples = [torch.ones(2, 4, 8, 8), torch.ones(2, 4, 4, 4)]
    separate = [["model: input 0"], ["a: output"], ["b: output"]]
    assert places(plan(Block(rest), examples)) == separate
    assert places(unified(["a", "b", "c"], model=Block(rest), inputs=examples)) == [
        ["model: input 0", "a: output", "b: output"]
    ]


def test_entries_that_mean_nothing_are_told_with_a_guess():
    found = refused(["add", "c"], ["aad"], ["Block/__ad___0"], ["nothing.like.it"])
    path = "activations.unified_scale_ops"
    assert set(found) == {f"{path}.1", f"{path}.2", f"{path}.3"}
    assert "Did you mean 'add'?" in found[f"{path}.1"]
    assert "Did you mean 'Block/__add___0'?" in found[f"{path}.2"]
    assert "The model has, for example" in found[f"{path}.3"]


def test_entries_need_not_match_without_validation():
    lenient = {"validate_scopes": False}
    assert places(unified(["nowhere"], ["add", "elsewhere"], activations=lenient))[1] == ["relu: output", "b: output"]
    assert places(unified(["nowhere", "c"], activations=lenient)) == SEPARATE


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (["b"], "'relu' serves all inputs of these operators already"),
        (["relu", "add"], "no quantizer stands at the inputs of 'relu'"),
        (["relu"], "no quantizer stands at the inputs of 'relu'"),
    ],
)
def test_groups_and_entries_without_effect_are_refused(group, words):
    assert words in refused(group)["activations.unified_scale_ops.0"]


def test_parts_of_a_concatenation_are_one_already():
    def rest(m, x):
        return m.c(torch.cat([m.a(x), m.b(x)], 2))

    assert "'a' serves all inputs" in refused(["c"], model=Block(rest))["activations.unified_scale_ops.0"]


def test_operators_that_are_ignored_have_nothing_to_share():
    found = refused(["a", "c"], activations={"ignored_scopes": ["c"]})
    assert "no quantizer stands at the inputs of 'c'" in found["activations.unified_scale_ops.0"]


def test_an_operator_in_two_groups_is_refused():
    found = refused(["a", "c"], ["{re}conv2d"])
    assert "activations.unified_scale_ops.0 names too; merge" in found["activations.unified_scale_ops.1"]


def test_different_settings_are_refused_with_both_names():
    found = refused(["a", "c"], device="TRIAL", scope_overrides={"activations": {"c": {"bits": 4}}})
    message = found["activations.unified_scale_ops.0"]
    assert "'a/conv2d#0 input 0' and 'c/conv2d#0 input 0' differ: 8 bits symmetric per tensor, and 4 bits" in message
    both = {"activations": {"c": {"bits": 4}, "a": {"bits": 4}}}
    (shared, *_) = unified(["a", "c"], device="TRIAL", scope_overrides=both).quantizers[3:]
    assert (shared.spec.bits, len(shared.places)) == (4, 2)


def test_scales_for_channels_of_different_number_cannot_be_one():
    model, x = Residual(), torch.ones(2, 3, 8, 8)
    per_channel = {"per_channel": True}
    message = refused(["a", "c"], model=model, inputs=x, device="TRIAL", activations=per_channel)
    assert "[2, 3, 8, 8] and [2, 4, 8, 8]" in message["activations.unified_scale_ops.0"]
    assert len(places(unified(["add"], model=model, inputs=x, device="TRIAL", activations=per_channel))) == 3


# NPUs.


@pytest.mark.parametrize("operator", [torch.add, torch.sub, torch.mul, torch.div, torch.minimum, torch.maximum])
def test_npus_have_one_scale_for_both_inputs_of_arithmetic(operator):
    def rest(m, x):
        y = m.relu(m.a(x))
        return m.c(operator(m.b(y), y))

    x = torch.ones(2, 4, 8, 8)
    assert ["relu: output", "b: output"] in places(plan(Block(rest), x, device="NPU"))
    assert ["relu: output"] in places(plan(Block(rest), x, device="CPU"))


def test_npus_leave_other_operators_and_single_inputs_alone():
    def rest(m, x):
        return m.c(torch.matmul(m.a(x), m.b(x)) + 1)

    found = plan(Block(rest), torch.ones(2, 4, 8, 8), device="NPU")
    assert places(found)[:3] == [["model: input 0"], ["a: output"], ["b: output"]]
    assert all(len(quantizer) == 1 for quantizer in places(found))


def test_npus_refuse_different_bits_for_the_inputs_of_one_operator():
    precision = {"bitwidth_per_scope": [[4, "add|INPUT1"]]}
    with pytest.raises(ConfigError, match=r"the device wants one scale for both, and 'model/.*add#0 input 0' and"):
        plan(Block(residual), torch.ones(2, 4, 8, 8), device="NPU", initializer={"precision": precision})


def test_what_a_device_unifies_is_not_missing_in_the_statistics():
    found = plan(Block(residual), torch.ones(2, 4, 8, 8), device="NPU")
    assert found.potential == {"weights": 3, "activations": 3}
    assert unified(["a", "c"]).potential == {"weights": 3, "activations": 3}


# In a model.

GROUP = {"unified_scale_ops": [["add"], ["a", "c"]]}


def document(device="CPU", **section):
    section = {"algorithm": "quantization", "activations": GROUP, **section}
    return {"input_info": {"sample_size": [2, 3, 8, 8]}, "target_device": device, "compression": section}


def data():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) * scale for scale in (1.0, 3.0)]


def create(config=None, **options):
    torch.manual_seed(0)
    return create_compressed_model(Residual(), config or document(), init_loader=data(), **options)


def test_the_ledger_says_which_quantizers_have_become_one():
    controller, _ = create()
    first, second = (
        controller.ledger[f"compression.quantization.activations.unified_scale_ops.{index}"] for index in range(2)
    )
    assert (first.value, first.modules) == (["add"], ("relu|OUTPUT", "b|OUTPUT"))
    assert second.modules == ("model/input 0|OUTPUT", "model/torch.Tensor.add#0|OUTPUT")
    assert set(controller.non_weight_quantizers) == {first.modules[0], second.modules[0]}


def test_the_shared_range_covers_all_tensors():
    config = document(initializer={"range": {"type": "min_max"}}, overflow_fix="disable")
    controller, model = create(config)
    seen = {}
    for name in ("relu", "b"):
        getattr(model, name).register_forward_hook(lambda m, i, y, name=name: seen.setdefault(name, []).append(y))
    controller.disable_activation_quantization()
    with torch.no_grad():
        for batch in data():
            model(batch)
    largest = max(float(y.abs().max()) for tensors in seen.values() for y in tensors)
    (shared,) = [q for q in controller.statistics().quantization.quantizers if q.name == "relu|OUTPUT"]
    assert max(-shared.low, shared.high) == pytest.approx(largest, rel=0.02)


def test_resumed_models_have_the_same_quantizers(tmp_path):
    controller, model = create()
    (tmp_path / "state.json").write_text(json.dumps(controller.get_compression_state()))
    state = json.loads((tmp_path / "state.json").read_text())
    resumed, again = create_compressed_model(Residual(), document(), state)
    again.load_state_dict(model.state_dict())
    assert list(resumed.all_quantizations) == list(controller.all_quantizations)
    x = data()[0]
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    handles = [handle.transform for handle in activation_transforms(again)]
    assert (len(handles), len(set(map(id, handles)))) == (4, 2)


@pytest.mark.parametrize(("device", "group", "scales"), [("CPU", GROUP, 2), ("NPU", {}, 3)])
def test_files_agree_with_torch(device, group, scales, tmp_path):
    controller, _ = create(document(device, activations=group))
    # Integer kernels of CPUs without VNNI saturate on the full range of weights, which is for the NPU.
    kernels = (False,) if device == "NPU" else (False, True)
    report = controller.export_onnx(tmp_path / "model.onnx", data()[0], tolerance=float("inf"))
    assert all(report.worst(optimized=optimized).relative_mean < 1e-3 for optimized in kernels)
    quantize = [node for node in File(tmp_path / "model.onnx").graph.node if node.op_type == "QuantizeLinear"]
    assert (len(quantize), len({node.input[1] for node in quantize})) == (4, scales)


def test_stripped_models_compute_the_same():
    controller, model = create()
    x = data()[0]
    expected = model.eval()(x)
    torch.testing.assert_close(controller.strip()(x), expected)
