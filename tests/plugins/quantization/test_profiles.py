"""What devices offer, against the facts that are known of NNCF's hardware profiles."""

import json
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

from compress_core import ConfigError
from compress_quantization.profiles import load_profile, parse_profile

ROOT = Path(__file__).resolve().parents[3]

WEIGHTED = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"]
ON_EVERY_DEVICE = [
    *WEIGHTED,
    *("matmul", "add", "mul", "div", "mean", "avg_pool", "layer_norm", "batch_norm"),
]
DEVICES = ["CPU", "GPU", "NPU", "TRIAL"]


@pytest.mark.parametrize("device", DEVICES)
def test_operators_whose_inputs_and_weights_are_quantized_everywhere(device):
    profile = load_profile(device)
    assert profile.device == device
    assert all(profile.quantizes_inputs(kind) for kind in ON_EVERY_DEVICE)
    assert all(profile.quantizes_weights(kind) for kind in [*WEIGHTED, "embedding"])
    assert not profile.quantizes_inputs("embedding")
    for passive in ("relu", "max_pool", "softmax", "concat", ""):
        assert not profile.quantizes_inputs(passive)
        assert not profile.quantizes_weights(passive)


def test_operators_of_single_devices():
    kinds = {
        "sub": "CPU GPU NPU",
        "min": "CPU GPU NPU",
        "compare": "CPU GPU NPU",
        "pow": "CPU GPU NPU",
        "sum": "CPU GPU NPU",
        "interpolate": "CPU GPU NPU",
        "interpolate_nearest": "CPU",
        "group_norm": "CPU NPU",
        "norm": "CPU NPU",
        "rnn": "CPU NPU",
        "scaled_dot_product_attention": "CPU NPU",
        "pixel_shuffle": "TRIAL",
        "round": "TRIAL",
    }
    found = {kind: " ".join(d for d in DEVICES if load_profile(d).quantizes_inputs(kind)) for kind in kinds}
    assert found == kinds


def test_any_is_cpu():
    assert load_profile("ANY") == load_profile("CPU")
    for unknown in ("CPU_SPR", "TPU"):
        with pytest.raises(ConfigError, match=f"'{unknown}'; choose one of ANY, CPU, GPU, NPU, TRIAL"):
            load_profile(unknown)


def offers(device, group, operator, **more):
    """All single choices that schemes amount to."""
    return {
        (bits, mode, per_channel)
        for scheme in load_profile(device).schemes(group, operator, **more)
        for bits in scheme.bits
        for mode in scheme.modes
        for per_channel in scheme.per_channel
    }


BOTH = ("symmetric", "asymmetric")


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_cpu_and_gpu_have_eight_bits(device):
    assert offers(device, "weights", "conv2d") == {(8, m, c) for m in BOTH for c in (True, False)}
    assert offers(device, "activations", "conv2d") == {(8, m, False) for m in BOTH}
    depthwise = offers(device, "activations", "conv2d", depthwise=True)
    assert depthwise == {(8, m, c) for m in BOTH for c in (True, False)}
    assert load_profile(device).schemes("weights", "linear")[0].signed is True


def test_npu_has_fewer_bits_too():
    eight = {(8, m, c) for m in BOTH for c in (True, False)}
    assert offers("NPU", "weights", "linear") == eight | {(b, "symmetric", c) for b in (4, 2) for c in (True, False)}
    assert offers("NPU", "activations", "add") == {(8, "symmetric", False), (8, "asymmetric", False)} | {
        (4, "symmetric", False)
    }
    assert offers("NPU", "activations", "compare") == {(8, m, False) for m in BOTH}
    assert offers("NPU", "weights", "embedding") == eight


def test_trial_has_everything_and_prefers_eight_bits_per_tensor():
    everything = {(bits, mode, c) for bits in range(2, 9) for mode in BOTH for c in (True, False)}
    for group in ("weights", "activations"):
        assert offers("TRIAL", group, "conv2d") == everything
        (scheme,) = load_profile("TRIAL").all_schemes(group)
        assert (scheme.bits[0], scheme.modes[0], scheme.per_channel[0], scheme.signed) == (8, "symmetric", False, None)


def test_unified_scales_overflow_and_presets():
    found = {device: load_profile(device) for device in DEVICES}
    assert {d for d, p in found.items() if "concat" in p.unified_scales} == {"CPU", "GPU", "NPU"}
    assert {d for d, p in found.items() if "add" in p.unified_scales} == {"NPU"}
    assert {d for d, p in found.items() if p.half_range_weights} == {"CPU"}
    assert {d: p.presets for d, p in found.items()} == {
        "CPU": "always",
        "GPU": "always",
        "NPU": "never",
        "TRIAL": "if_given",
    }


def test_queries_and_keys_of_attention_are_quantized_and_values_are_not():
    profile = load_profile("CPU")
    found = [profile.quantizes_input("scaled_dot_product_attention", index) for index in range(3)]
    assert found == [True, True, False]
    assert [profile.quantizes_input("add", index) for index in range(2)] == [True, True]
    assert not profile.quantizes_input("relu", 0)
    assert {mode for _, mode, _ in offers("CPU", "activations", "scaled_dot_product_attention")} == {"symmetric"}


def test_a_profile_that_says_something_twice_or_names_nothing_is_refused():
    document = json.loads((resources.files("compress_quantization") / "profiles" / "cpu.json").read_text())
    document["operators"].append({"kinds": ["linear"], "activations": ["a8"]})
    with pytest.raises(ValueError, match="CPU describes the operator 'linear' twice"):
        parse_profile(document)
    document["operators"] = [{"kinds": ["linear"], "activations": ["a9"]}]
    with pytest.raises(KeyError, match="a9"):
        parse_profile(document)


@pytest.mark.slow
def test_the_wheel_holds_the_profiles(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"compress_quantization/profiles/{d.lower()}.json" for d in DEVICES} <= names
