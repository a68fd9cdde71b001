"""Profiles of target devices, which list what a device can quantize; the built-in ones are JSON files in `profiles/`.

Operators have these kinds, whatever module or function of torch computes them:

    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul embedding rnn
    add sub mul div min max (of two tensors) compare pow mean sum norm (L2) round
    avg_pool interpolate (linear, cubic, area) interpolate_nearest pixel_shuffle
    batch_norm group_norm layer_norm scaled_dot_product_attention concat

A kind that a profile does not list is not quantized on that device. The order in a file is the order of preference: a
quantizer gets the first scheme, and the first number of bits, mode and granularity in it, unless the config says
otherwise. `profile_document` describes all keys, and plugins contribute more devices.

Sources: for ANY, CPU, GPU and NPU the hardware profiles of NNCF 2.16. TRIAL is its table of quantizable operators plus
one-dimensional convolutions, whose weights NNCF quantizes but whose inputs it does not. `onnxruntime-cpu`: what ONNX
Runtime 1.32 makes integer kernels of, seen in the graphs that it optimizes. `openvino-cpu`: the profile CPU without
what OpenVINO 2026 was seen to compute in floating point. `xnnpack`: the operators that ExecuTorch's
partitioner accepts with static quantization, and the grids of its quantizer. `tensorrt`: "Working with quantized types"
in TensorRT's documentation. The first two are tested on the kernels that these runtimes choose.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from compress_core import Choice, ConfigError, find_choice
from compress_core.config.errors import did_you_mean
from compress_core.contract.choices import choices_of
from compress_core.trace import Call
from compress_quantization.config import Mode, QuantizerGroup
from compress_quantization.operators import kinds_of
from compress_quantization.profile_document import TARGET_DEVICE

# Name -> file in `profiles/`, what it is.
_BUILT_IN = {
    "ANY": ("cpu", "the same as CPU"),
    "CPU": ("cpu", "NNCF's profile of CPUs"),
    "GPU": ("gpu", "NNCF's profile of Intel GPUs"),
    "NPU": ("npu", "NNCF's profile of Intel NPUs"),
    "TRIAL": ("trial", "everything that can be quantized, in 2 to 8 bits; no real device"),
    "onnxruntime-cpu": ("onnxruntime-cpu", "ONNX Runtime on CPUs"),
    "openvino-cpu": ("openvino-cpu", "OpenVINO on CPUs"),
    "xnnpack": ("xnnpack", "XNNPACK, with which ExecuTorch runs models on phones and other CPUs"),
    "tensorrt": ("tensorrt", "TensorRT on NVIDIA's GPUs, with explicit quantization"),
}

_PER_CHANNEL = {"per_channel": True, "per_tensor": False}


@dataclass(frozen=True)
class Scheme:
    """A set of ways to quantize a tensor: any combination of its numbers of bits, modes and granularities.

    Attributes:
        bits: Numbers of bits.
        modes: Modes.
        per_channel: Granularities: whether each channel has its own range.
        signed: Whether symmetric grids are signed; None if both are possible.
        narrow_range: Whether symmetric grids leave out one integer; None for 8-bit weights alone.
        smallest_scale: Smallest step of a grid; 0 if there is none.
    """

    bits: tuple[int, ...]
    modes: tuple[Mode, ...]
    per_channel: tuple[bool, ...]
    signed: bool | None = None
    narrow_range: bool | None = None
    smallest_scale: float = 0.0

    def fits(self, *, bits: int | None = None, mode: Mode | None = None, per_channel: bool | None = None) -> bool:
        """Returns whether the scheme supports these settings; None allows any value."""
        return (
            (bits is None or bits in self.bits)
            and (mode is None or mode in self.modes)
            and (per_channel is None or per_channel in self.per_channel)
        )

    def __str__(self) -> str:
        bits = _listed(str(bits) for bits in sorted(self.bits))
        granularity = _listed("per channel" if per_channel else "per tensor" for per_channel in self.per_channel)
        return f"{bits} bits {_listed(self.modes)} {granularity}"


@dataclass(frozen=True)
class Operator:
    """What a device supports for one kind of operator.

    Attributes:
        activations: Schemes for its inputs; if there are none, the operator does not demand quantized inputs.
        depthwise_activations: The same for depthwise convolutions.
        weights: Schemes for its weights.
        inputs: Indices of the inputs that are quantized; None for all.
        output: What its integer kernel demands of the output: nothing, a quantizer ("required"), or a quantizer that
            others demand, without which inputs are not quantized either ("decides").
        fused_activations: Activation functions that may stand between it and the quantizer of its output.
        fuses_with: Kinds of operators that the runtime fuses with it; the input that one of them makes is not
            quantized.
    """

    activations: tuple[Scheme, ...] = ()
    depthwise_activations: tuple[Scheme, ...] = ()
    weights: tuple[Scheme, ...] = ()
    inputs: tuple[int, ...] | None = None
    output: Literal["free", "required", "decides"] = "free"
    fused_activations: frozenset[str] = frozenset()
    fuses_with: frozenset[str] = frozenset()


_NOTHING = Operator()


@dataclass(frozen=True)
class Profile:
    """What a device supports.

    Attributes:
        device: Its name in `target_device`.
        presets: Whether `preset` sets the modes: always, only if the config names one, or never.
        half_range_weights: Whether 8-bit weights may overflow on the device, so that `overflow_fix` applies.
        unified_scales: Kinds of operators whose inputs must share one quantizer.
        quantized_gates: Activation functions whose gate the device computes with integers.
        operators: What the device supports for each kind of operator.
    """

    device: str
    presets: Literal["always", "if_given", "never"]
    half_range_weights: bool
    unified_scales: frozenset[str] = frozenset()
    quantized_gates: frozenset[str] = frozenset()
    operators: Mapping[str, Operator] = field(default_factory=dict)

    def schemes(self, group: QuantizerGroup, operator: str, *, depthwise: bool = False) -> tuple[Scheme, ...]:
        """Returns the schemes for the weights or the inputs of an operator, in order of preference."""
        offered = self.operators.get(operator, _NOTHING)
        if group == "weights":
            return offered.weights
        return offered.depthwise_activations if depthwise else offered.activations

    def all_schemes(self, group: QuantizerGroup) -> tuple[Scheme, ...]:
        """Returns the schemes for weights or activations of all operators."""
        found = [
            scheme
            for offered in self.operators.values()
            for scheme in (
                offered.weights if group == "weights" else (*offered.activations, *offered.depthwise_activations)
            )
        ]
        return tuple(dict.fromkeys(found))

    def operator(self, kind: str) -> Operator:
        """Returns what the device supports for operators of this kind."""
        return self.operators.get(kind, _NOTHING)

    def operator_of(self, call: Call) -> Operator:
        """Returns what the device supports for a call."""
        return self.operator(self.kind_of(call))

    def kind_of(self, call: Call) -> str:
        """Returns the kind of an operator as the device lists it."""
        kinds = kinds_of(call)
        return next((kind for kind in kinds if kind in self.operators), kinds[0])

    def quantizes_inputs(self, operator: str) -> bool:
        """Returns whether inputs of operators of this kind are quantized."""
        return bool(self.operators.get(operator, _NOTHING).activations)

    def quantizes_input(self, operator: str, index: int) -> bool:
        """Returns whether the input with this index is quantized, for operators of this kind."""
        offered = self.operators.get(operator, _NOTHING)
        return bool(offered.activations) and (offered.inputs is None or index in offered.inputs)

    def quantizes_weights(self, operator: str) -> bool:
        """Returns whether weights of operators of this kind are quantized."""
        return bool(self.operators.get(operator, _NOTHING).weights)


def built_in_devices() -> list[Choice]:
    """Returns the devices that this package contributes."""
    folder = resources.files("compress_quantization") / "profiles"
    documents = {file: json.loads((folder / f"{file}.json").read_text("utf-8")) for file, _ in _BUILT_IN.values()}
    return [Choice(TARGET_DEVICE, name, documents[file], text) for name, (file, text) in _BUILT_IN.items()]


def load_profile(target_device: str) -> Profile:
    """Returns the profile of a device; ANY is CPU.

    Raises:
        ConfigError: There is no profile for the device.
    """
    found = find_choice(target_device, TARGET_DEVICE)
    if found is None:
        devices = choices_of(TARGET_DEVICE)
        hint = did_you_mean(target_device, devices) if target_device != "CPU_SPR" else ""
        raise ConfigError(
            f"there is no quantization profile for the target_device '{target_device}'; choose one of "
            f'{", ".join(devices)} ("CPU" is right for Sapphire Rapids unless it is to compute in bfloat16).{hint}'
        )
    return parse_profile({"device": target_device, **found.value})


def devices_with_half_range() -> list[str]:
    """Returns the devices on which 8-bit weights may overflow."""
    return [name for name, found in choices_of(TARGET_DEVICE).items() if found.value["half_range_weights"]]


def parse_profile(document: Mapping[str, Any]) -> Profile:
    """Returns the profile that a JSON document describes.

    Raises:
        KeyError: A scheme is named but not described, or a key is missing.
        ValueError: A kind of operator occurs twice.

    `profile_document.check_document` finds everything that is wrong; a device passes it when a plugin contributes it.
    """
    schemes = {name: _scheme(entry) for name, entry in document["schemes"].items()}
    operators: dict[str, Operator] = {}
    for entry in document["operators"]:
        activations, depthwise, weights = (
            tuple(schemes[name] for name in entry.get(key, ()))
            for key in ("activations", "depthwise_activations", "weights")
        )
        inputs = tuple(entry["inputs"]) if "inputs" in entry else None
        for kind in entry["kinds"]:
            if kind in operators:
                raise ValueError(f"the profile {document['device']} describes the operator '{kind}' twice")
            operators[kind] = Operator(
                activations,
                depthwise or activations,
                weights,
                inputs,
                entry.get("output", "free"),
                frozenset(entry.get("fused_activations", ())),
                frozenset(entry.get("fuses_with", ())),
            )
    return Profile(
        device=document["device"],
        presets=document["presets"],
        half_range_weights=document["half_range_weights"],
        unified_scales=frozenset(document.get("unified_scales", ())),
        quantized_gates=frozenset(document.get("quantized_gates", ())),
        operators=operators,
    )


def described(schemes: Iterable[Scheme]) -> str:
    """Returns a description of schemes for messages."""
    return "; ".join(str(scheme) for scheme in schemes) or "nothing"


def _scheme(entry: Mapping[str, Any]) -> Scheme:
    return Scheme(
        bits=tuple(entry["bits"]),
        modes=tuple(entry["modes"]),
        per_channel=tuple(_PER_CHANNEL[name] for name in entry["granularities"]),
        signed=entry.get("signed"),
        narrow_range=entry.get("narrow_range"),
        smallest_scale=entry.get("smallest_scale", 0.0),
    )


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
