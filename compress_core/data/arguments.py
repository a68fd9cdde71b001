"""How a model is called with what its library's loader gives, where the user has not said so with `forward_fn`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress_core.torch_internals import tree_leaves

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

# Keys under which loaders keep the input of a model that takes a single one.
_INPUT_KEYS = ("image", "images", "img", "imgs", "input", "inputs", "x", "pixel_values", "audio", "waveform", "video")


def arguments_of(model: nn.Module, batch: Any) -> Arguments | None:
    """Returns the positional and keyword arguments for a batch, targets removed; None if the batch does not tell.

    A tensor is the only argument. Of a mapping, forward gets the entries that it has names for; if there are none, and
    it needs one argument, the entry that is called `image`, `input` or the like. Of a sequence, it gets the inputs
    without the targets: (inputs, target), ((a, b), target), (dict, target), (a, b, target). Detectors take images of
    several sizes: (images, targets), or a pair or a dict for each image; in training mode they get the targets, too,
    without which they do not run.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return _of_mapping(model, batch)
    if not isinstance(batch, (tuple, list)) or not batch:
        return None
    detection = _detection(batch)
    if detection is not None:
        return (detection if model.training and _takes(model, 2) else detection[:1]), {}
    if _one_dict_per_sample(batch) or _is_list_of_images(model, batch):
        return (list(batch),), {}
    return _of_sequence(model, batch)


def samples_in(batch: Any) -> int | None:
    """Returns the number of samples of a batch; None if it holds no tensor."""
    if isinstance(batch, (tuple, list)):
        detection = _detection(batch)
        if detection is not None:
            return len(detection[0])
        if _one_dict_per_sample(batch):
            return len(batch)
    if isinstance(batch, Mapping):
        key = _input_key(batch)
        batch = batch if key is None else batch[key]
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[0] if leaf.ndim else 1
    return None


def suggestion(batch: Any) -> str:
    """Returns an example of a `forward_fn` for a batch."""
    call = "model(batch)"
    if isinstance(batch, Mapping):
        tensors = (key for key, value in batch.items() if isinstance(value, torch.Tensor))
        key = _input_key(batch) or next(tensors, None)
        call = "model(...)" if key is None else f"model(batch[{key!r}])"
    elif isinstance(batch, (tuple, list)):
        call = "model(batch[0])"
    return f"forward_fn=lambda model, batch: {call}"


def _of_sequence(model: nn.Module, batch: Sequence[Any]) -> Arguments:
    inputs = _inputs_of(model, batch)
    if len(inputs) > 1:
        return tuple(inputs), {}
    only = inputs[0]
    if isinstance(only, Mapping):
        return _of_mapping(model, only)
    if isinstance(only, (tuple, list)) and not (len(only) > 1 and _takes_a_sequence(model)):
        return tuple(only), {}
    return (only,), {}


def _of_mapping(model: nn.Module, batch: Mapping[Any, Any]) -> Arguments:
    parameters = inspect.signature(model.forward).parameters.values()
    named = {str(key): value for key, value in batch.items() if key in {parameter.name for parameter in parameters}}
    missing = [parameter.name for parameter in parameters if _is_required(parameter) and parameter.name not in named]
    key = _input_key(batch)
    if key is not None and key not in named and (len(missing) == 1 or (not named and _takes(model, 1))):
        return (batch[key],), named
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return (), {str(key): value for key, value in batch.items()}
    return (), named


def _input_key(batch: Mapping[Any, Any]) -> str | None:
    """Returns the key of the input, if one alone of those that loaders use is there and holds a tensor."""
    found = [key for key in _INPUT_KEYS if isinstance(batch.get(key), torch.Tensor)]
    return found[0] if len(found) == 1 else None


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
    pictures = _is_images(batch) and all(item.ndim == 3 and item.is_floating_point() for item in batch)
    return pictures and _says_sequence(model)


def _takes_a_sequence(model: nn.Module) -> bool:
    """Returns whether forward takes several inputs in one argument: it says so, or has a single argument."""
    return _says_sequence(model) or not _takes(model, 2)


def _says_sequence(model: nn.Module) -> bool:
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    annotation = str(parameters[0].annotation) if parameters else ""
    return annotation.removeprefix("typing.").lower().startswith(("list[", "sequence[", "tuple["))


def _takes(model: nn.Module, number: int) -> bool:
    """Returns whether forward can be called with so many positional arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    positional = sum(
        kind in {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds
    )
    return positional >= number or inspect.Parameter.VAR_POSITIONAL in kinds


def _is_required(parameter: inspect.Parameter) -> bool:
    kinds = {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    return parameter.kind in kinds and parameter.default is parameter.empty


def _inputs_of(model: nn.Module, batch: Sequence[Any]) -> Sequence[Any]:
    """Removes the target from a batch: (inputs, target), or the arguments that forward needs, followed by targets."""
    if isinstance(batch[0], (tuple, list, Mapping)):
        return batch[:1]
    parameters = inspect.signature(model.forward).parameters.values()
    required = sum(
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for parameter in parameters
    )
    return batch[: max(required, 1)]
