"""`load_state`: reads a `state_dict` of NNCF, or of compress-core, counts what it loads, and names what it does not."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.errors import StateError, UsageError
from compress_core.nncf.creating import controller_of

logger = logging.getLogger(__name__)

# What wrappers put in front of a name: DistributedDataParallel, older NNCF, torch.compile.
_WRAPPERS = ("module.", "nncf_module.", "_orig_mod.")
_OPERATION = re.compile(r"^(?:(?P<module>.+)\.)?(?:pre_ops|post_ops)\.\d+\.(?:op|operand)\.(?P<name>.+)$")
_QUANTIZER = re.compile(
    r"^(?:.+\.)?(?:external_quantizers|activation_quantizers|function_quantizers|external_op)\."
    r"(?P<quantizer>.+)\.(?P<name>[^.]+)$"
)
# Of no meaning without NNCF: the value that padded convolutions pad with, where it is the usual one.
_IDLE = re.compile(r"(?:^|\.)nncf_padding_value$|(?:^|\.)(?:_level_high|_level_low|_levels|enabled|_num_bits)$")
_SHOWN = 10


def load_state(
    model: nn.Module,
    state_dict_to_load: Mapping[str, Any],
    is_resume: bool = False,
    keys_to_ignore: Iterable[str] | None = None,
) -> int:
    """Loads a `state_dict` of NNCF or of compress-core into a compressed model, or into a plain one.

    Masks, scales and ranges of NNCF go to the algorithms that they belong to, weights to the weights. Prefixes of
    wrappers and old names are understood. What is not loaded is named in a warning, and so is what the model has and
    the file has not; with `is_resume` either is an error, and nothing is loaded.

    Args:
        model: What `create_compressed_model` of this module returned, a wrapper of it, or a plain model.
        state_dict_to_load: The `state_dict`.
        is_resume: Whether everything has to fit.
        keys_to_ignore: Names to leave out, in the file or in the model, with or without prefixes of wrappers; the model
            keeps what it has there, also with `is_resume`. A name that is nowhere is named in a warning.

    Returns:
        The number of tensors of the file that were loaded.

    Raises:
        StateError: `is_resume` is true, and something does not fit; the model is as before.
        UsageError: The state is no dict of tensors, or the model is none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: got a {type(model).__name__}; pass the model that create_compressed_model returned")
    if not isinstance(state_dict_to_load, Mapping):
        kind = type(state_dict_to_load).__name__
        raise UsageError(f"state_dict_to_load: got a {kind}; pass checkpoint['state_dict'], a dict of tensors")
    ignored = {keys_to_ignore} if isinstance(keys_to_ignore, str) else set(keys_to_ignore or ())
    controller = controller_of(model)
    target = model if controller is None else controller.model
    if controller is None:
        return _load(target, state_dict_to_load, [], is_resume, ignored)
    algorithms = list(controller.algorithms.values())
    count: int = controller.context.transaction.run(
        lambda: _load(target, state_dict_to_load, algorithms, is_resume, ignored), call="load_state()"
    )
    return count


def _load(
    model: nn.Module, whole: Mapping[str, Any], algorithms: Iterable[Any], is_resume: bool, ignored: set[str]
) -> int:
    known = model.state_dict().keys()
    names = {key: _unwrapped(key, known) for key in whole}
    ignored = {names.get(name, _unwrapped(name, known)) for name in ignored}
    _warn_of_unknown(ignored - set(names.values()) - known)
    given = {key: value for key, value in whole.items() if names[key] not in ignored}
    foreign = [found for key, value in given.items() if (found := _foreign(key, names[key], value)) is not None]
    taken: dict[str, tuple[str, torch.Tensor] | None] = {}
    set_by = set()
    for algorithm in algorithms:
        found = algorithm.take_nncf([tensor for tensor in foreign if tensor.key not in taken])
        if None in found.values():
            set_by.add(algorithm.name)
        taken |= found
    own = model.state_dict()
    loaded, values, left = set(taken), {}, {}
    for key, value in given.items():
        if key in taken:
            continue
        problem = _problem(key, names[key], value, own, given)
        if problem is None:
            values[names[key]] = value
            loaded.add(key)
        else:
            left[key] = problem
    values |= {entry[0]: entry[1] for entry in taken.values() if entry is not None}
    idle = {key for key in left if _IDLE.search(key) and not _matters(key, given[key], loaded)}
    missing = [name for name in _missing(own, values, set_by) if name not in ignored]
    _report({key: why for key, why in left.items() if key not in idle}, missing, is_resume)
    model.load_state_dict({**own, **values})
    logger.info("load_state: %d of %d tensors were loaded", len(loaded), len(given))
    return len(loaded)


def _problem(key: str, name: str, value: Any, own: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Returns why an entry of the file cannot be loaded under a name of the model; None if it can."""
    if name not in own:
        return "the model has nothing that it belongs to"
    if name != key and name in given:
        return f"the file has '{name}' besides, which is loaded"
    if not isinstance(own[name], torch.Tensor):
        return None  # what a module saves with `get_extra_state`
    if not isinstance(value, torch.Tensor):
        return f"it is no tensor but a {type(value).__name__}"
    if value.shape != own[name].shape:
        return f"its shape is {tuple(value.shape)}, and that of the model {tuple(own[name].shape)}"
    return None


def _warn_of_unknown(names: Iterable[str]) -> None:
    if unknown := sorted(names):
        shown = ", ".join(repr(name) for name in unknown[:_SHOWN])
        logger.warning("keys_to_ignore: neither the file nor the model has %s%s", shown, _more(len(unknown)))


def _unwrapped(key: str, known: Collection[str]) -> str:
    """Returns a name without prefixes of wrappers, unless the model itself has it with them."""
    name = key
    while name not in known:
        prefix = next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]
    return name


def _foreign(key: str, name: str, value: Any) -> NncfTensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    operation, quantizer = _OPERATION.match(name), _QUANTIZER.match(name)
    if operation is not None:
        module = (operation["module"] or "").removesuffix("._nncf")
        return NncfTensor(key, module, "", operation["name"], value)
    if quantizer is not None:
        return NncfTensor(key, "", quantizer["quantizer"], quantizer["name"], value)
    return None


def _matters(key: str, value: Any, loaded: set[str]) -> bool:
    """Returns whether a tensor that describes another one stands for something that was not loaded."""
    if key.endswith("nncf_padding_value"):
        return bool(torch.as_tensor(value).ne(0).any())
    stem = key.rpartition(".")[0]
    return not any(other.startswith(f"{stem}.") for other in loaded)


def _missing(own: Iterable[str], values: Mapping[str, Any], set_by: Iterable[str]) -> list[str]:
    """Returns what the model has and nothing was loaded for.

    Args:
        own: Names in the model.
        values: Those that are loaded.
        set_by: Algorithms that have set masks themselves, of several tensors for one of the file.
    """
    masks = tuple(f".{name}.mask" for name in set_by)
    return [name for name in own if name not in values and not (masks and name.endswith(masks))]


def _report(left: Mapping[str, str], missing: list[str], is_resume: bool) -> None:
    parts = []
    if left:
        shown = "; ".join(f"'{key}' ({why})" for key, why in list(left.items())[:_SHOWN])
        parts.append(f"{len(left)} tensors of the file are not loaded: {shown}{_more(len(left))}")
    if missing:
        names = ", ".join(f"'{name}'" for name in missing[:_SHOWN])
        parts.append(f"{len(missing)} tensors of the model stay as they are: {names}{_more(len(missing))}")
    if not parts:
        return
    if is_resume:
        raise StateError(
            f"state_dict_to_load: does not fit the model, and is_resume asks for all of it. {'. '.join(parts)}. Create "
            "the model from the config that the file was trained with, or pass is_resume=False"
        )
    logger.warning("load_state: %s", ". ".join(parts))


def _more(number: int) -> str:
    return f", and {number - _SHOWN} more" if number > _SHOWN else ""
