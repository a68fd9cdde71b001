"""How a model is called with what its library's loader gives, where the user has not said so with `forward_fn`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from compress_core.data.structures import has_tensors, inputs_of, is_tensor_like, named_entries

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

# Keys under which loaders keep the input of a model that takes a single one.
INPUT_KEYS = ("image", "images", "img", "imgs", "input", "inputs", "x", "pixel_values", "audio", "waveform", "video")
# Names of an argument that is the whole batch, whatever is in it.
_WHOLE = ("batch", "batched_inputs", "batch_dict", "input_dict", "data_dict", "sample", "samples")
# The same, if the batch is an object: `data` is also what the only tensor of a dict is called.
_WHOLE_OBJECT = (*_WHOLE, "data", "graph", "example", "instances", "inputs")
_SEQUENCES = (tuple, list)


def arguments_of(model: nn.Module, batch: Any) -> Arguments | None:
    """Returns the positional and keyword arguments for a batch, targets removed; None if the batch does not tell.

    A tensor or a packed sequence is the only argument. Of what has names (a mapping, a named tuple, a dataclass, any
    object with tensors), forward gets the entries that it has names for; if there are none, and it needs one argument,
    the entry that is called `image`, `input` or the like; else the whole. A forward that calls its first argument
    `batch` or the like, or annotates it with the batch's class, gets the whole. Of a sequence, it gets the inputs
    without the targets: (inputs, target), ((a, b), target), (dict, target), (a, b, target). Detectors take images of
    several sizes: (images, targets), or a pair or a dict for each image; in training mode they get the targets, too,
    without which they do not run.
    """
    if is_tensor_like(batch):
        return (batch,), {}
    if isinstance(batch, _SEQUENCES):
        if not has_tensors(batch):
            return None
        entries = named_entries(batch)
        named = None if entries is None else _of_names(model, entries)
        return _of_plain_sequence(model, batch) if named is None else named
    entries = named_entries(batch)
    return None if entries is None else _of_named(model, batch, entries)


def samples_in(batch: Any) -> int | None:
    """Returns the number of samples of a batch; None if it holds no tensor."""
    if isinstance(batch, _SEQUENCES) and not is_tensor_like(batch):
        detection = _detection(batch)
        if detection is not None:
            return len(detection[0])
        if _one_dict_per_sample(batch):
            return len(batch)
    entries = named_entries(batch)
    if entries is not None:
        if not isinstance(batch, (Mapping, tuple)) and (stated := _stated_samples(batch)) is not None:
            return stated
        key = input_key(entries)
        batch = batch if key is None else entries[key]
    first = next(inputs_of(batch), None)
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0]) if len(first.batch_sizes) else 0
    return None if first is None else (first.shape[0] if first.ndim else 1)


def _stated_samples(batch: Any) -> int | None:
    """Returns what an object says itself; the tensors of a graph count its nodes."""
    for name in ("num_graphs", "batch_size"):
        number = getattr(batch, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


# Batches with names.


def _of_named(model: nn.Module, whole: Any, entries: Mapping[Any, Any]) -> Arguments:
    if _wants_whole(model, whole, entries):
        return (whole,), {}
    found = _of_names(model, entries)
    if found is not None:
        return found
    for key in INPUT_KEYS:  # {"inputs": {...}, "targets": {...}}
        inner: Any = entries.get(key)
        if not is_tensor_like(inner) and has_tensors(inner):
            return ((list(inner),), {}) if _is_images(inner) and _is_of_images(inner) else _of_input(model, inner)
    named = _chosen(_parameters(model), entries)
    is_open = isinstance(whole, Mapping) and any(is_tensor_like(entries.get(key)) for key in INPUT_KEYS)
    return ((whole,), {}) if not named and not is_open and _takes(model, 1) else ((), named)


def _of_names(model: nn.Module, entries: Mapping[Any, Any]) -> Arguments | None:
    """Returns arguments if the names in a batch give all that forward needs; None if they do not."""
    parameters = _parameters(model)
    named = _chosen(parameters, entries)
    missing = [parameter.name for parameter in parameters if _is_required(parameter) and parameter.name not in named]
    key = input_key(entries)
    if key is not None and key not in named and (len(missing) == 1 or (not named and _takes(model, 1))):
        return (entries[key],), named
    if missing:
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return (), {str(key): value for key, value in entries.items()}
    return ((), named) if any(map(has_tensors, named.values())) else None


def _chosen(parameters: list[inspect.Parameter], entries: Mapping[Any, Any]) -> dict[str, Any]:
    names = {parameter.name for parameter in parameters if parameter.kind in _BY_NAME}
    return {str(key): value for key, value in entries.items() if key in names}


def _wants_whole(model: nn.Module, whole: Any, entries: Mapping[Any, Any]) -> bool:
    """Returns whether forward takes a batch as one argument: it says so by the argument's type or name."""
    parameters = _parameters(model)
    if not parameters or sum(map(_is_required, parameters)) > 1:
        return False
    first = parameters[0]
    if first.name in entries and isinstance(whole, Mapping):
        return False
    annotation = first.annotation
    text = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    kinds = {cls.__name__ for cls in type(whole).__mro__[:-1]}
    if isinstance(whole, Mapping):
        kinds |= {"Mapping", "MutableMapping", "Dict"}
    names = _WHOLE if type(whole) is dict else _WHOLE_OBJECT
    moves_itself = not isinstance(whole, Mapping) and callable(getattr(whole, "to", None))
    if first.name in names or (moves_itself and first.name not in entries):
        return True
    return text.split("[")[0].rpartition(".")[2].strip("'\"") in kinds


def input_key(entries: Mapping[Any, Any]) -> str | None:
    """Returns the key of the input, if one alone of those that loaders use is there and holds a tensor."""
    found = [key for key in INPUT_KEYS if is_tensor_like(entries.get(key))]
    return found[0] if len(found) == 1 else None


# Batches without names.


def _of_plain_sequence(model: nn.Module, batch: Sequence[Any]) -> Arguments:
    detection = _detection(batch)
    if detection is not None:
        return (detection if model.training and _takes(model, 2) else detection[:1]), {}
    if _one_dict_per_sample(batch) or _is_list_of_images(model, batch):
        return (list(batch),), {}
    inputs = _inputs_of(model, batch)
    return (tuple(inputs), {}) if len(inputs) > 1 else _of_input(model, inputs[0])


def _of_input(model: nn.Module, only: Any) -> Arguments:
    """Returns the arguments for the inputs of a batch, from which the targets were removed."""
    if is_tensor_like(only):
        return (only,), {}
    entries = named_entries(only)
    if entries is not None:
        return _of_named(model, only, entries)
    if not isinstance(only, _SEQUENCES):
        return (only,), {}
    if len(only) == 1 and named_entries(only[0]) is not None:
        return _of_input(model, only[0])
    if not (len(only) > 1 and _takes_a_sequence(model)):
        return tuple(only), {}
    return (only,), {}


def _inputs_of(model: nn.Module, batch: Sequence[Any]) -> Sequence[Any]:
    """Removes the target from a batch: (inputs, target), or the arguments that forward needs, followed by targets.

    Names of files, indices as numbers, and None in front of the only input are no inputs.
    """
    needed = max(sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in _parameters(model)), 1)
    if needed == 1:
        batch = batch[next((index for index, item in enumerate(batch) if has_tensors(item)), 0) :]
    if not is_tensor_like(batch[0]) and (isinstance(batch[0], _SEQUENCES) or named_entries(batch[0]) is not None):
        return batch[:1]
    return batch[:needed]


def _detection(batch: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
    """Returns the images and the targets of a batch of a detector: one tensor and one mapping for each image."""
    if batch and all(isinstance(sample, (tuple, list)) and len(sample) == 2 for sample in batch):
        pairs = [*zip(*batch, strict=True)]  # the samples as they are: collate_fn=lambda samples: samples
        if _is_images(pairs[0]) and _is_targets(pairs[1]):
            return list(pairs[0]), list(pairs[1])
    if len(batch) >= 2 and _is_images(batch[0]) and _is_targets(batch[1]) and len(batch[0]) == len(batch[1]):
        return list(batch[0]), list(batch[1])
    return None


def _is_images(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


def _is_targets(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _one_dict_per_sample(batch: Sequence[Any]) -> bool:
    """Returns whether a batch is a list of dicts with the same keys, such as that of detectron2."""
    return len(batch) > 1 and _is_targets(batch) and all(set(item) == set(batch[0]) for item in batch)


def _is_list_of_images(model: nn.Module, batch: Sequence[Any]) -> bool:
    """Returns whether a batch without targets is a list of images for a forward that says that it takes a list."""
    return _is_images(batch) and _is_of_images(batch) and _says_sequence(model)


def _is_of_images(batch: Sequence[torch.Tensor]) -> bool:
    return all(item.ndim == 3 and item.is_floating_point() for item in batch)


# The signature of forward.

_BY_NAME = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _takes_a_sequence(model: nn.Module) -> bool:
    """Returns whether forward takes several inputs in one argument: it says so, or has a single argument."""
    return _says_sequence(model) or not _takes(model, 2)


def _says_sequence(model: nn.Module) -> bool:
    parameters = [p for p in _parameters(model) if p.kind is p.POSITIONAL_OR_KEYWORD]
    annotation = str(parameters[0].annotation) if parameters else ""
    return annotation.removeprefix("typing.").lower().startswith(("list[", "sequence[", "tuple["))


def _takes(model: nn.Module, number: int) -> bool:
    """Returns whether forward can be called with so many positional arguments."""
    kinds = [parameter.kind for parameter in _parameters(model)]
    positional = sum(
        kind in {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds
    )
    return positional >= number or inspect.Parameter.VAR_POSITIONAL in kinds


def _is_required(parameter: inspect.Parameter) -> bool:
    kinds = {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    return parameter.kind in kinds and parameter.default is parameter.empty
