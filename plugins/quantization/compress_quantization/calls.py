"""Properties of single calls in a trace: the names that scopes can use for them, and the weights that they use."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping

from compress_core.config.scopes import ScopedModule
from compress_core.trace import Call, ForwardTrace, Trace
from compress_core.trace.graph import ValueId
from compress_quantization.operators import LINEAR_KINDS, base_name, is_transparent, is_weight_argument, kind_of

# Functions that NNCF knows by the one that they call.
_NNCF_FUNCTIONS = {"relu6": ("hardtanh",), "hardtanh": ("relu6",)}

# Operators of ATen that multiply matrices.
_PRODUCTS = frozenset(["mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv"])


def call_names(trace: Trace, modules: Mapping[str, ScopedModule]) -> dict[tuple[int, int], ScopedModule]:
    """Returns the names that scopes can use for each call: (number of the forward, number of the call) -> names.

    A call has a dotted name, `layer1.0.add`, and NNCF's, which count the calls of a function by a module:
    `ResNet/Sequential[layer1]/BasicBlock[0]/__iadd___0`.
    """
    found = {}
    for number, forward in enumerate(trace.forwards):
        counts: Counter[tuple[str, str, bool]] = Counter()
        kinds = {(call.module, base_name(call.function), _is_in_place(call)) for call in forward.calls}
        for call in forward.calls:
            function, in_place = base_name(call.function), _is_in_place(call)
            owner = modules.get(call.module, ScopedModule(call.module))
            turn = counts[call.module, call.function, in_place]
            counts[call.module, call.function, in_place] += 1
            aliases = _nncf_functions(function, in_place, (call.module, function, not in_place) in kinds)
            addresses = dict.fromkeys(n.rpartition("/")[0] if _is_operator(n) else n for n in owner.nncf_names)
            nncf = tuple(f"{address}/{alias}_{turn}" for address in addresses for alias in aliases)
            found[number, call.index] = ScopedModule(f"{call.module}.{function}".strip("."), nncf)
    return found


def _is_in_place(call: Call) -> bool:
    """Returns whether a call is of the variant of its function that overwrites its argument."""
    name = call.function.rpartition(".")[2]
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    return name.endswith("_") or call.keywords.get("inplace") is True or _overwrites(call)


def _overwrites(call: Call) -> bool:
    return bool(call.writes) and call.inputs[:1] != [] and call.inputs[0][1] in call.writes


def _nncf_functions(function: str, in_place: bool, has_other: bool) -> list[str]:
    """Returns the names that NNCF gives to a function.

    Args:
        function: Its name, without underscores.
        in_place: Whether this is the variant that overwrites its argument, `relu_` or `__iadd__`.
        has_other: Whether the module calls the other variant as well; the names of that one then mean it alone.
    """
    names = [function, *_NNCF_FUNCTIONS.get(function, ())]
    plain = [*names, f"__{function}__"]
    overwriting = [*(f"{name}_" for name in names), f"__i{function}__"]
    mine, others = (overwriting, plain) if in_place else (plain, overwriting)
    return mine if has_other else [*mine, *others]


def call_key(forward: int, call: int) -> str:
    """Returns the internal key of a call in a scope filter, which users do not write."""
    return f"call {call} of example {forward}"


def is_of(call: Call, forward: ForwardTrace) -> bool:
    """Returns whether a call was made in this forward."""
    return call.index < len(forward.calls) and forward.calls[call.index] is call


def _is_operator(nncf_name: str) -> bool:
    return "[" not in nncf_name.rpartition("/")[2] and "/" in nncf_name


def weight_uses(trace: Trace) -> dict[str, Call]:
    """Returns, for each parameter that is used as a weight, the first call that uses it."""
    uses: dict[str, Call] = {}
    for forward in trace.forwards:
        for call in forward.calls:
            for path, value in call.inputs:
                name = forward.values[value].parameter
                if name and is_weight_argument(call, path):
                    uses.setdefault(name, call)
    return uses


def multiplications(call: Call, forward: ForwardTrace, weight: int) -> int:
    """Returns how many multiplications the elements of a weight take part in when a call uses it; 0 for lookups.

    Args:
        call: The call.
        forward: The forward that makes it.
        weight: Number of the value that is the weight.
    """
    kind, elements = kind_of(call.function), math.prod(forward.values[weight].shape)
    if kind == "embedding":
        return 0
    if kind == "matmul":
        return sum(map(functools.partial(_of_product, forward), call.operators))
    if kind == "rnn":  # once for each sample and step
        return elements * math.prod(forward.values[call.inputs[0][1]].shape[:-1])
    if kind.startswith("conv") and call.results:
        # Each element is multiplied at each position of the output; in a transposed convolution, of the input.
        value = call.inputs[0][1] if kind.startswith("conv_transpose") else call.results[0]
        shape = forward.values[value].shape
        spatial = int(kind[-2])
        return elements * math.prod(shape[-spatial:]) * (shape[0] if len(shape) == spatial + 2 else 1)
    data = next((value for path, value in call.inputs if not is_weight_argument(call, path)), None)
    return 0 if data is None else elements * math.prod(forward.values[data].shape[:-1])


def _of_product(forward: ForwardTrace, number: int) -> int:
    """Returns the multiplications of a product of matrices; 0 if the operator is none."""
    operator = forward.operators[number]
    if str(operator.function).removeprefix("aten.").partition(".")[0] not in _PRODUCTS:
        return 0
    # The matrices are the last two, after what is added to their product.
    left, right = (forward.values[value].shape for value in operator.inputs[-2:])
    return math.prod(left) * (right[-1] if len(right) > 1 else 1)


def weight_values(forward: ForwardTrace) -> dict[ValueId, str]:
    """Returns the values that hold a parameter or parts of one, rearranged: number of the value -> its name.

    Attention, for example, chunks the matrix of its three projections.
    """
    found = {value.index: value.parameter for value in forward.values if value.parameter}
    for call in forward.calls:
        sources = {found[value] for _, value in call.inputs if value in found}
        if len(sources) == 1 and is_transparent(call):
            found |= dict.fromkeys(call.results, sources.pop())
    return found


def owners_of_weights(call: Call, trace: Trace) -> list[str]:
    """Returns the modules whose parameters a call uses as weights although it is not made by their forward.

    Attention uses its last projection in this way.
    """
    forward = next(forward for forward in trace.forwards if is_of(call, forward))
    values = [forward.values[value] for path, value in call.inputs if is_weight_argument(call, path)]
    owners = [value.parameter.rpartition(".")[0] for value in values if value.parameter]
    return [] if call.module in owners else owners


def is_depthwise(call: Call, trace: Trace) -> bool:
    """Returns whether a call is a convolution with one filter group for each input channel."""
    if not kind_of(call.function).startswith("conv"):
        return False
    return 1 < groups_of(call) == _input_channels(call, trace)


def groups_of(call: Call) -> int:
    """Returns the number of groups of a convolution, also of a transposed one."""
    groups = call.keywords.get("groups", call.arguments[6] if len(call.arguments) > 6 else 1)
    return groups if isinstance(groups, int) else 1


def _input_channels(call: Call, trace: Trace) -> int:
    for forward in trace.forwards:
        if is_of(call, forward):
            return forward.values[call.inputs[0][1]].shape[1]
    return 0


def first_convolutions(trace: Trace) -> list[Call]:
    """Returns the 2d and 3d convolutions that an input of the model reaches before any other of these."""
    found: list[Call] = []
    for forward in trace.forwards:
        reached: set[ValueId] = {value.index for value in forward.inputs}
        for call in forward.calls:
            if not any(value in reached for _, value in call.inputs):
                continue
            if kind_of(call.function) in ("conv2d", "conv3d"):
                found.append(call)
            elif kind_of(call.function) not in LINEAR_KINDS:
                reached.update(call.results)
    return found
