"""What a training has besides the model: optimizers, schedulers, a gradient scaler, averages of the weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress_core.data.memory import refuse_out_of_memory
from compress_core.errors import StateError, UsageError
from compress_core.session.checkpoint_file import SavedPart, plain

logger = logging.getLogger(__name__)

Given = Mapping[str, Sequence[Any]]


def given_parts(**arguments: Any) -> dict[str, list[Any]]:
    """Returns the objects that were given, by the name of the argument, in the order in which to load them.

    Args:
        arguments: An object, a list or tuple of objects, or None, by the name of the argument.

    Raises:
        UsageError: An object has no `state_dict`.
    """
    found: dict[str, list[Any]] = {}
    for name, value in arguments.items():
        objects = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        for part in objects:
            if not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))):
                raise UsageError(
                    f"{name}: a {type(part).__name__} has no state_dict() and load_state_dict(); pass the object "
                    "itself, or a list of such objects"
                )
        if objects:
            found[name] = objects
    return found


def saved_parts(given: Given, model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """Returns the states of the objects that were given, as `SavedPart` reads them.

    Raises:
        UsageError: A state cannot be loaded without pickle.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        argument: [
            {
                "kind": type(part).__name__,
                "state": plain(dict(part.state_dict()) if not _is_module(part) else part.state_dict(), place),
                "parameters": _parameters(part, names),
            }
            for place, part in _places(argument, parts)
        ]
        for argument, parts in given.items()
    }


def _places(argument: str, parts: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, part in enumerate(parts):
        yield argument if len(parts) == 1 else f"{argument}[{number}]", part


def _is_module(part: Any) -> bool:
    return isinstance(part, nn.Module)


def _parameters(part: Any, names: Mapping[int, str]) -> list[list[tuple[str, list[int]]]] | None:
    if not isinstance(part, torch.optim.Optimizer):
        return None
    return [[(names.get(id(p), ""), list(p.shape)) for p in group["params"]] for group in part.param_groups]


def check_parts(given: Given, saved: Mapping[str, Sequence[SavedPart]], model: nn.Module, path: str) -> None:
    """Checks that the objects that were given are such as those that were saved.

    Raises:
        StateError: Something is missing, too many, of another class, or has other parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for argument in sorted(given.keys() | saved.keys()):
        mine, theirs = len(given.get(argument, ())), len(saved.get(argument, ()))
        if mine != theirs:
            remedy = f"pass {argument}=" if theirs else f"leave {argument}= out, and load what it needs yourself"
            raise StateError(
                f"the checkpoint '{path}' has {theirs or 'no'} {argument}{'s' if theirs > 1 else ''}, and "
                f"{mine or 'none'} was given; {remedy if not (mine and theirs) else 'pass as many as were saved'}. "
                "Weights alone: controller.model.load_state_dict(read_checkpoint(path).model_state)"
            )
        for (place, part), entry in zip(_places(argument, given[argument]), saved[argument], strict=True):
            if type(part).__name__ != entry.kind:
                raise StateError(
                    f"{place}: the checkpoint '{path}' has the state of a {entry.kind}, and a {type(part).__name__} "
                    "was given"
                )
            _check_parameters(place, path, _parameters(part, names), entry.parameters)
            if _is_module(part):
                check_entries(part, entry.state, f"{place} of the checkpoint '{path}'")


def _check_parameters(
    place: str,
    path: str,
    here: list[list[tuple[str, list[int]]]] | None,
    saved: list[list[tuple[str, list[int]]]] | None,
) -> None:
    if here == saved:
        return
    mine, theirs = ([len(group) for group in groups or []] for groups in (here, saved))
    if mine != theirs or here is None or saved is None:
        what = f"groups of {theirs} parameters, here they are of {mine}"
    else:
        pairs = zip(*([entry for group in groups for entry in group] for groups in (here, saved)), strict=True)
        (name, shape), (saved_name, saved_shape) = next((a, b) for a, b in pairs if a != b)
        what = f"{_called(saved_name)} of shape {saved_shape} where {_called(name)} of shape {shape} is here"
    raise StateError(
        f"{place}: the checkpoint '{path}' has {what}; create it from the parameters of the resumed model, in the same "
        "groups and the same order as when it was saved"
    )


def _called(name: str) -> str:
    return f"the parameter '{name}'" if name else "a parameter that is not the model's"


def check_entries(module: nn.Module, saved: Mapping[str, Any], place: str) -> None:
    """Compares a `state_dict` with that of a module: names, types, and shapes of parameters.

    Buffers may have another shape, because modules may resize them in loading.

    Raises:
        StateError: They differ.
    """
    here = module.state_dict()
    missing, unexpected = [n for n in here if n not in saved], [n for n in saved if n not in here]
    if missing or unexpected:
        raise StateError(
            f"{place} does not fit the {type(module).__name__}: it lacks {_some(missing)} and has {_some(unexpected)} "
            "besides"
        )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in here.items():
        found = saved[name]
        if not isinstance(tensor, torch.Tensor) or not isinstance(found, torch.Tensor):
            differs = isinstance(tensor, torch.Tensor) != isinstance(found, torch.Tensor)
            mine, theirs = type(tensor).__name__, type(found).__name__
        else:
            differs = tensor.dtype != found.dtype or (name in parameters and tensor.shape != found.shape)
            mine, theirs = (f"{tuple(t.shape)} and {t.dtype}" for t in (tensor, found))
        if differs:
            raise StateError(f"{place} does not fit: '{name}' is of {theirs} there, of {mine} in the model")


def _some(names: Sequence[str]) -> str:
    return "nothing" if not names else f"{list(names[:3])}" + (f" ({len(names)} in all)" if len(names) > 3 else "")


def load_parts(given: Given, saved: Mapping[str, Sequence[SavedPart]], what: str) -> None:
    """Loads the states of objects that `check_parts` has checked.

    Raises:
        StateError: One of them refuses its state; those before it are changed.
    """
    for argument, parts in given.items():
        for (place, part), entry in zip(_places(argument, parts), saved[argument], strict=True):
            if argument == "scaler" and entry.state and not part.state_dict():
                logger.warning("scaler: the one that was given is disabled, so the saved scale of losses is not used")
            # A copy, because optimizers and schedulers go on with the objects that they are given.
            loading(place, what, part.load_state_dict, _near(part, copy.deepcopy(entry.state)))


def _near(part: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Moves tensors among an optimizer's options, such as a rate, to where they are now; torch moves only its state."""
    groups = getattr(part, "param_groups", None) or []
    for group, saved in zip(groups, state.get("param_groups", []) if groups else [], strict=False):
        for key, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(saved.get(key), torch.Tensor):
                saved[key] = saved[key].to(value.device)
    return state


def loading(place: str, what: str, load: Callable[[Any], Any], state: Any) -> None:
    """Calls a function that loads a state, and names the place and what was saved in its errors.

    Raises:
        StateError: The function raised an error.
    """
    try:
        load(state)
    except Exception as error:
        refuse_out_of_memory(error)
        raise StateError(f"{place}: the state in {what} does not fit: {error}") from error
