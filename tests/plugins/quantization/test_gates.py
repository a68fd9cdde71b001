"""SiLU with a quantized gate, x * q(sigmoid(x)): where it stands, what it computes, and that it is off when others are."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import ConfigError, StateError, UsageError, create_compressed_model
from compress_core.config.scopes import ScopeFilter
from compress_core.trace import trace
from compress_core.transforms import activation_transforms
from compress_quantization.config import QuantizationConfig
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.gates import FixedQuantize, QuantizedGate
from compress_quantization.planning import Planner
from compress_quantization.profiles import load_profile
from compress_quantization.quantizers import NativeFakeQuantize
from tests.onnx_helpers import Wired, norm
from tests.plugins.quantization.devices.device_nets import IMAGES, conv

DEVICE = "onnxruntime-cpu"
OTHERS = ["ANY", "CPU", "GPU", "NPU", "TRIAL", "openvino-cpu", "tensorrt", "xnnpack"]


def planned(model, examples=None, device=DEVICE, **section):
    """The plan for a model, with the scopes of the section."""
    config = QuantizationConfig.model_validate({"algorithm": "quantization", **section})
    recorded = trace(model.eval(), torch.ones(2, *IMAGES) if examples is None else examples)
    scopes = ScopeFilter(model, {f"ignored_scopes.{i}": entry for i, entry in enumerate(config.ignored_scopes)})
    return Planner(model, recorded, config, load_profile(device), scopes).plan()


def gates(model, examples=None, **section):
    """The names of the gates that a model gets."""
    return [q.name.removesuffix("|GATE") for q in planned(model, examples, **section).quantizers if q.is_gate]


# What is computed.


def reference(x):
    """x * q(sigmoid(x)) in float64, with the nearest multiples of 1/255."""
    x = x.double()
    return x * (torch.sigmoid(x) * 255).round() / 255


@pytest.mark.parametrize("size", [(2, 8, 4, 4), (4, 8, 32, 32), (), (0, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 0), (torch.float32, 0), (torch.bfloat16, 0.02), (torch.float16, 5e-3)]
)
def test_values_are_those_of_the_formula(size, dtype, tolerance):
    x = (8 * torch.randn(size, generator=torch.Generator().manual_seed(0))).to(dtype)
    actual = QuantizedGate(FixedQuantize())(x)
    assert actual.dtype == dtype
    # At ties of the rounding, which float32 decides elsewhere, one step of the gate.
    ties = ((torch.sigmoid(x.double()) * 255) % 1 - 0.5).abs() < 1e-4
    difference = (actual.double() - reference(x)).abs()
    assert bool((difference <= x.double().abs() * (tolerance + 1e-6 + ties / 255)).all())


def test_the_grid_has_both_ends_of_the_gate():
    grid = FixedQuantize().grid()
    assert (float(grid.scale), int(grid.zero_point)) == (float(torch.tensor(1.0) / 255), 0)
    assert (grid.quant_min, grid.quant_max, grid.channel_dim) == (0, 255, None)
    gate = QuantizedGate(FixedQuantize())
    x = torch.tensor([100.0, 20.0, 0.0, -20.0, -100.0])
    assert torch.equal(gate(x), torch.tensor([100.0, 20.0, 0.0, 0.0, 0.0]))
    assert bool(gate(torch.tensor(float("nan"))).isnan())


@pytest.mark.parametrize("size", [(2, 8, 4, 4), (4, 8, 32, 32)])
def test_gradients_are_straight_through(size):
    x = (3 * torch.randn(size, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    (grad,) = torch.autograd.grad(QuantizedGate(FixedQuantize())(x).sum(), x, create_graph=True)
    s = torch.sigmoid(x.detach())
    expected = (s * 255).round() / 255 + x.detach() * s * (1 - s)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(grad.sum(), x)
    slope = s * (1 - s)
    assert torch.allclose(second, 2 * slope + x.detach() * slope * (1 - 2 * s), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("switch", ["enabled", "observer"])
def test_a_gate_that_is_off_is_silu_to_the_last_bit(switch):
    gate, seen = QuantizedGate(FixedQuantize()), []
    x = torch.randn(2, 8, 4, 4)
    setattr(gate.quantizer, switch, False if switch == "enabled" else seen.append)
    assert torch.equal(gate(x), F.silu(x))
    assert not seen


def test_the_range_cannot_be_set_and_nothing_is_learned_or_saved():
    quantizer = FixedQuantize()
    with pytest.raises(UsageError, match="the range of a gate is 0 to 1"):
        quantizer.set_range(torch.zeros(1), torch.ones(1))
    assert not [*quantizer.parameters()]
    assert not quantizer.state_dict()
    assert float(quantizer.half().scale) == 1
    assert quantizer.scale.dtype == torch.float32


# Where gates stand.

CONV = {
    "a": conv(),
    "b": conv(),
    "c": conv(),
    "n": norm(8),
    "s": nn.SiLU(),
    "fc": nn.Linear(4, 4),
    "fd": nn.Linear(4, 4),
}
PLACES = {
    "function": (lambda m, x: m.b(F.silu(m.n(m.a(x)))), ["model/silu#0"]),
    "keyword": (lambda m, x: m.b(F.silu(input=m.a(x))), ["model/silu#0"]),
    "in place": (lambda m, x: m.b(F.silu(m.a(x), inplace=True)), ["model/silu#0"]),
    "module": (lambda m, x: m.b(m.s(m.a(x))), ["s/silu#0"]),
    "shared module": (lambda m, x: m.c(m.s(m.b(m.s(m.a(x))))), ["model/silu#0", "model/silu#1"]),
    "one call of a shared module": (lambda m, x: m.c(m.s(m.b(m.s(x)))), ["model/silu#1"]),
    "in a loop": (lambda m, x: m.b(functools.reduce(lambda t, _: m.s(m.a(t)), range(3), x)), ["s/silu#0"]),
    "moved before": (lambda m, x: m.b(F.silu(m.a(x).flip(1).reshape(-1, *IMAGES))), ["model/silu#0"]),
    "moved behind": (lambda m, x: m.b(F.max_pool2d(F.silu(m.a(x)), 2)), ["model/silu#0"]),
    "joined before": (lambda m, x: m.b(F.silu(torch.cat([m.a(x), m.c(x)], 2))), ["model/silu#0"]),
    "joined behind": (
        lambda m, x: m.b(torch.cat([F.silu(m.a(x)), F.silu(m.c(x))], 2)),
        ["model/silu#0", "model/silu#1"],
    ),
    "residual": (lambda m, x: m.b(F.silu(m.a(x)) + m.c(x)), ["model/silu#0"]),
    "of the input": (lambda m, x: m.b(F.silu(x)), []),
    "behind a linear layer": (lambda m, x: m.fd(F.silu(m.fc(x))), []),
    "behind an addition": (lambda m, x: m.b(F.silu(m.a(x) + m.c(x))), []),
    "returned": (lambda m, x: F.silu(m.a(x)), []),
    "returned as well": (lambda m, x: (F.silu(m.a(x)),) * 2 + (m.b(F.silu(m.a(x))),), ["model/silu#1"]),
    "read in floating point": (lambda m, x: m.fd(F.layer_norm(F.silu(m.a(x)), (4,))), []),
    "read in both": (lambda m, x: m.b(y := F.silu(m.a(x))) + torch.exp(y), []),
    "other functions": (lambda m, x: m.c(F.gelu(m.b(F.mish(m.a(x))))), []),
}


def silu_nets(name):
    return Wired(PLACES[name][0], **copy.deepcopy(CONV))


@pytest.mark.parametrize("name", PLACES)
def test_gates_stand_between_quantizers_only(name):
    assert gates(silu_nets(name)) == PLACES[name][1]


@pytest.mark.parametrize("device", OTHERS)
def test_other_devices_have_none(device):
    found = planned(silu_nets("function"), device=device)
    assert not any(q.is_gate or "is_gate" in q.to_dict() for q in found.quantizers)


def test_a_call_that_reads_other_tensors_in_another_example_has_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.s = conv(), conv(), conv(), nn.SiLU()

        def forward(self, x, skip=False):
            x = self.a(x)
            return self.b(self.s(x + 1 if skip else x))

    x = torch.randn(2, *IMAGES)
    assert gates(Net(), [(x, False)]) == ["s/silu#0"]
    assert gates(Net(), [(x, False), (x, True)]) == []


WRITTEN = {
    "x * sigmoid(x)": lambda t: t * torch.sigmoid(t),
    "sigmoid(x) * x": lambda t: t.sigmoid() * t,
    "in place": lambda t: t.mul_(t.sigmoid()),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_out_gate_gets_the_quantizers_of_a_product(name):
    def names(wiring):
        found = planned(Wired(wiring, **copy.deepcopy(CONV)))
        return [q.name for q in found.quantizers if q.group == "activations" and not q.is_gate]

    silu = WRITTEN[name]
    found = names(lambda m, x: m.b(silu(m.n(m.a(x)))))
    assert len(found) == 5
    assert sum("sigmoid#0|OUTPUT" in each for each in found) == 1
    # Where x is not on a grid, or the product is not put on one, it stays one operator in floating point.
    assert len(names(lambda m, x: m.fd(silu(m.fc(x))))) == 2
    assert len(names(lambda m, x: silu(m.a(x)))) == 2
    # Hard swish is another function.
    assert len(names(lambda m, x: m.b((t := m.a(x)) * F.relu6(t + 3) / 6))) == 4


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"ignored_scopes": ["s"]}, []),
        ({"ignored_scopes": ["s.silu"]}, []),
        ({"ignored_scopes": ["s/silu#0|GATE"]}, []),
        ({"ignored_scopes": ["s/silu#0"]}, []),
        ({"activations": {"ignored_scopes": ["s"]}}, []),
        ({"activations": {"ignored_scopes": ["s/silu#0|GATE"]}}, []),
        ({"activations": {"target_scopes": ["a", "b"]}}, []),
        ({"activations": {"target_scopes": ["a", "b", "s"]}}, ["s/silu#0"]),
        # Without the quantizer in front or behind there is no gate.
        ({"ignored_scopes": ["a|OUTPUT"]}, []),
        ({"ignored_scopes": ["s|OUTPUT"]}, []),
        ({"ignored_scopes": ["b"]}, []),
        ({"ignored_scopes": ["model/input 0|OUTPUT"]}, ["s/silu#0"]),
    ],
)
def test_scopes_take_it_away(section, expected):
    assert gates(silu_nets("module"), **section) == expected


def test_what_is_ignored_is_listed():
    found = planned(silu_nets("module"), ignored_scopes=["s/silu#0|GATE"])
    assert found.skipped["s/silu#0|GATE"] == "ignored by ignored_scopes.0"
    assert found.potential["activations"] == 5


@pytest.mark.parametrize(
    "section",
    [
        {"ignored_scopes": ["s/silu#1|GATE"]},
        {"scope_overrides": {"activations": {"s/silu#0|GATE": {"mode": "asymmetric"}}}},
        {"initializer": {"precision": {"type": "manual", "bitwidth_per_scope": [[8, "s/silu#0|GATE"]]}}},
    ],
)
def test_entries_that_mean_nothing_are_refused(section):
    with pytest.raises(ConfigError, match=r"s/silu#[01]\|GATE"):
        gates(silu_nets("module"), **section)


# The life of a model with gates.


def batches(number=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *IMAGES, generator=generator) for _ in range(number)]


class Net(nn.Module):
    """A block of each kind, with the in-place SiLU of torchvision's networks."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.c = conv(), norm(8), conv(), conv()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.act(self.n(self.a(x)))
        x = x + F.silu(self.b(x))
        return self.c(x)


def create(state=None, *, loader=True, device=DEVICE, **section):
    torch.manual_seed(0)
    document = {"target_device": device, "compression": {"algorithm": "quantization", **section}}
    if state is not None and not loader:
        document["input_info"] = {"sample_size": [4, *IMAGES]}
    data = {"init_loader": [(batch, 0) for batch in batches()]} if loader else {}
    return create_compressed_model(Net(), document, state, **data)


def gates_of(model):
    return [h.transform for h in activation_transforms(model) if isinstance(h.transform, QuantizedGate)]


def steps(model, number=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
    model.train()
    for batch in batches(number):
        optimizer.zero_grad()
        model(batch.clone()).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_the_model_computes_the_formula():
    controller, model = create()
    x, known = batches()[0], controller.all_quantizations
    assert [name for name in known if name.endswith("|GATE")] == ["act/silu#0|GATE", "model/silu#1|GATE"]
    model.eval()

    def silu(t):
        return t * (torch.sigmoid(t) * 255).round() / 255

    q = {name.removesuffix("|OUTPUT"): module for name, module in known.items()}
    y = q["act"](silu(q["n"](model.n(model.a(q["model/input 0"](x))))))
    z = q["model/silu#1"](silu(q["b"](model.b(y))))
    expected = q["c"](model.c(q["model/torch.Tensor.add#0"](y + z)))
    assert torch.allclose(model(x), expected, atol=1e-6)
    controller.disable_activation_quantization()
    plain, h = model(x), F.silu(model.n(model.a(x)))
    assert torch.equal(plain, model.c(h + F.silu(model.b(h))))
    controller.enable_activation_quantization()
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert not torch.equal(model(x), plain)


def test_calibration_sees_the_model_without_gates():
    (with_gates, _), (without, _) = create(), create(ignored_scopes=["act/silu#0|GATE", "model/silu#1|GATE"])
    ranges = {name: q.range() for name, q in with_gates.all_quantizations.items() if not name.endswith("|GATE")}
    assert ranges.keys() == without.all_quantizations.keys()
    for name, quantizer in without.all_quantizations.items():
        assert all(map(torch.equal, quantizer.range(), ranges[name])), name
    with_gates.init_range()
    assert all(gate.quantizer.observer is None and gate.quantizer.enabled for gate in gates_of(with_gates.model))


def test_resumed_training_has_the_same_bits():
    controller, model = create()
    steps(model)
    saved = pickle.loads(pickle.dumps({"state": controller.get_compression_state(), "model": model.state_dict()}))
    assert not any("gate" in key for key in saved["model"])
    _, resumed = create(saved["state"], loader=False)
    resumed.load_state_dict(saved["model"])
    assert len(gates_of(resumed)) == 2
    x = batches()[0]
    assert torch.equal(resumed.eval()(x), model(x))
    assert torch.equal(steps(resumed)(x), steps(model)(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda gate: gate["spec"].update(bits=4),
        lambda gate: gate["spec"].update(signed=True),
        lambda gate: gate.update(shape=[8]),
        lambda gate: gate.update(is_gate=1),
        lambda gate: gate.update(is_gate=False),
        lambda gate: gate.update(name="other|OUTPUT"),
        lambda gate: gate.update(places=[{"kind": "module_output", "module": "act", "item": []}]),
        lambda gate: gate["places"][0].update(function="torch.sigmoid"),
    ],
)
def test_damaged_states_are_refused(change):
    controller, _ = create()
    state = copy.deepcopy(controller.get_compression_state())
    quantizers = state["algorithms"]["quantization"]["plan"]["details"]["quantizers"]
    change(next(entry for entry in quantizers if entry.get("is_gate")))
    with pytest.raises(StateError, match=r"quantizers\.\d+"):
        create(state, loader=False)


def test_copies_stripped_and_compiled_models_compute_the_same():
    controller, model = create()
    x = batches()[0]
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    stripped = controller.strip()
    assert torch.allclose(stripped(x), expected, atol=1e-6)
    assert [type(gate.quantizer) for gate in gates_of(stripped)] == [NativeFakeQuantize] * 2
    assert not any(isinstance(module, FakeQuantize) for module in stripped.modules())
    controller.disable_activation_quantization()
    assert not activation_transforms(controller.strip())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    _, model = create()
    model, x = model.eval().to(dtype), batches()[0].to(dtype)
    out = model(x)
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    assert {gate.quantizer.scale.dtype for gate in gates_of(model)} <= {torch.float32, torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(model.float()(x.float()).isfinite().all())


def test_statistics_list_gates():
    controller, _ = create()
    statistics = controller.statistics().quantization
    found = [q for q in statistics.quantizers if q.name.endswith("|GATE")]
    assert [(q.bits, q.mode, q.signed, q.low, q.high) for q in found] == [(8, "symmetric", False, 0, 1)] * 2
    assert statistics.shares() == {"weights": 1, "activations": 1}


# Files.

SITES = (("act", 0), ("the model", 1))


@pytest.mark.parametrize(
    "opset", [13, 21, pytest.param(18, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("fast_exporter")
def test_the_file_computes_what_was_trained_with_integers(tmp_path, opset):
    pytest.importorskip("onnxruntime")
    controller, model = create()
    steps(model)
    report = controller.export(tmp_path / "model.onnx", batches()[0], opset=opset, by_layer=True)
    assert report.worst().steps < 1.5
    assert report.worst().relative_mean < 2e-3
    assert {name: report.runtime_operators.get(name, 0) for name in ("QLinearSigmoid", "QLinearMul")} == {
        "QLinearSigmoid": 2,
        "QLinearMul": 2,
    }
    assert "Sigmoid" not in report.runtime_operators
    of_gates = [layer.place for layer in report.layers if "gate" in layer.place]
    assert of_gates == [f"'{at}' (torch_nn_functional_silu_{n}_output, quantization_gate)" for at, n in SITES]
    assert max(layer.steps for layer in report.layers) < 0.75
