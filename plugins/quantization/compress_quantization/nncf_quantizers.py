"""Scales and ranges of quantizers from a `state_dict` that NNCF saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from compress_core.contract.nncf_tensors import NncfTensor
from compress_quantization.fake_quantize import FakeQuantize
from compress_quantization.plan import PlannedQuantizer

# What a symmetric and an asymmetric quantizer of NNCF learn; the names are the same here.
_LEARNED = ("scale", "input_low", "input_range")
_ADDRESS = re.compile(r"\[([^\]]+)\]")
_CALL = re.compile(r"^(?P<function>.+)_(?P<turn>\d+)$")
# The methods behind operators, and functions that NNCF names after the method in place.
_SAME = {"__add__": "add", "__iadd__": "add", "__radd__": "add", "__mul__": "mul", "__imul__": "mul", "__rmul__": "mul"}

Taken = dict[str, tuple[str, torch.Tensor] | None]


def taken_from_nncf(
    tensors: Sequence[NncfTensor], present: Sequence[tuple[PlannedQuantizer, FakeQuantize]], model: nn.Module
) -> Taken:
    """Returns what to load, and sets whether grids are signed; see `Algorithm.take_nncf`.

    A quantizer is taken as a whole or not at all: where bits, kind or shape differ, its numbers would mean something
    else.
    """
    by_quantizer: dict[tuple[str, str, str], list[NncfTensor]] = {}
    for tensor in tensors:
        # The scale of a layer's weight and its mask are operations of one layer: their number tells them apart.
        operation = tensor.key.rpartition(".")[0]
        by_quantizer.setdefault((tensor.module, tensor.quantizer, operation), []).append(tensor)
    taken: Taken = {}
    names = {id(module): name for name, module in model.named_modules()}
    for (layer, quantizer, _), entries in by_quantizer.items():
        if not any(entry.name in _LEARNED for entry in entries):
            continue
        found = [pair for pair in present if _is_meant(pair[0], layer, quantizer)]
        if len(found) == 1:
            taken |= _values(*found[0], entries, names.get(id(found[0][1]), ""))
    return taken


def _values(planned: PlannedQuantizer, module: FakeQuantize, entries: Iterable[NncfTensor], prefix: str) -> Taken:
    given = {entry.name: entry for entry in entries}
    learned = {name for name, _ in module.named_parameters(recurse=False)}
    if {name for name in given if name in _LEARNED} != learned or not prefix:
        return {}
    own = module.state_dict()
    if any(given[name].value.numel() != own[name].numel() for name in learned):
        return {}
    bits = given.get("_num_bits")
    if bits is not None and int(bits.value) != module.bits:
        return {}
    signed = given.get("signed_tensor")
    if signed is not None and planned.spec.signed not in (None, bool(int(signed.value))):
        return {}
    taken: Taken = {
        given[name].key: (f"{prefix}.{name}", given[name].value.reshape(own[name].shape).to(own[name].dtype))
        for name in learned
    }
    if bits is not None:
        taken[bits.key] = None
    if signed is not None:
        module.signed = bool(int(signed.value))
        taken[signed.key] = None
    enabled = given.get("enabled")
    if enabled is not None:
        module.enabled = bool(int(enabled.value))
        taken[enabled.key] = None
    return taken


def _is_meant(planned: PlannedQuantizer, layer: str, quantizer: str) -> bool:
    if layer:
        return planned.parameter == f"{layer}.weight"
    if planned.parameter or "|" not in quantizer:
        return False
    node, _, port = quantizer.rpartition("|")
    name, _, own_port = planned.name.rpartition("|")
    return port == own_port and _is_node(name, node)


def _is_node(name: str, node: str) -> bool:
    """Returns whether a name of ours, `layer1.0/torch.Tensor.add#1` or `relu`, is that of a node of NNCF's."""
    if node.startswith("/nncf_model_input_"):
        number = node.rpartition("_")[2]
        return name in (f"model/input {number}", f"/input {number}") or (number == "0" and name.endswith("/input 0"))
    address, _, last = node.rpartition("/")
    owner = ".".join(_ADDRESS.findall(address))
    call = _CALL.match(last)
    if name == owner and owner:
        return True
    place, _, function = name.rpartition("/")
    own_function, _, turn = function.partition("#")
    if call is None or place not in (owner, owner or "model") or not own_function:
        return False
    plain, wanted = own_function.rpartition(".")[2], _SAME.get(call["function"], call["function"])
    return plain.rstrip("_") == wanted.rstrip("_") and (turn or "0") == call["turn"]
