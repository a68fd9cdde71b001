"""What a report measures on copies of the model: accuracy, time of a forward, and whether the stripped model agrees."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.data.structures import tensors_of
from compress_core.errors import UsageError
from compress_core.trace import Example
from compress_core.transforms.model_wide import evaluating
from compress_core.transforms.python_state import copied

# Forwards of each model, as many as fit in the time.
_ROUNDS, _SECONDS, _WARM_UP = 30, 2.0, 2
# A model whose first forward takes longer (in seconds) is not timed.
_TOO_SLOW = 5.0


def accuracy_steps(given: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the steps that the user gave, checked.

    Raises:
        UsageError: They are not numbers by name.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f'accuracy must be numbers by name, such as {{"float": 0.93}}, got {type(given).__name__}')
    return {str(name): _number(value, f"accuracy[{name!r}]") for name, value in given.items()}


def _number(value: Any, what: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise UsageError(f"{what} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:  # arrays of several numbers, integers beyond all floats
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise UsageError(f"{what} must be a number, got {type(value).__name__}{shape}: {error}") from error


def evaluated(evaluate_fn: Callable[[nn.Module], Any], models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Returns what a function of the user's says of copies of models, which are in eval mode.

    Args:
        evaluate_fn: The function.
        models: The models by the name of the step.

    Raises:
        UsageError: It is no function, or returns no number.
    """
    if not callable(evaluate_fn):
        raise UsageError(f"evaluate_fn must be a function of the model, got {type(evaluate_fn).__name__}")
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = _number(evaluate_fn(copied(model).eval()), "what evaluate_fn returns")
    return found


@dataclass(frozen=True)
class Call:
    """The arguments of a forward.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        source: Where they come from, in words.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: str

    @classmethod
    def of(cls, example: Example, model: nn.Module) -> Call:
        """Returns the arguments with which an example calls a copy of the model."""
        calls: list[Call] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(cls(args, kwargs, example.source))

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with evaluating(model):
                example.run(model, example.batch)
        finally:
            handle.remove()
        if not calls:
            raise UsageError("the example does not call the model")
        return calls[0]

    def shapes(self) -> str:
        """Returns the shapes of the tensors, in words."""
        return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_of((self.args, dict(self.kwargs))))

    def run(self, model: nn.Module) -> Any:
        """Calls a model."""
        return model(*self.args, **self.kwargs)


def largest_difference(model: nn.Module, stripped: nn.Module, call: Call) -> float | None:
    """Returns how far the outputs of two models are apart, relative to the largest value of each output.

    None if they return no tensors of floating-point numbers, or not the same ones; NaN if one of them has NaN.
    """
    with evaluating(model), evaluating(stripped):
        pairs = [list(tensors_of(call.run(module))) for module in (model, stripped)]
    if len(pairs[0]) != len(pairs[1]):
        return None
    found = []
    for reference, other in zip(*pairs, strict=True):
        if reference.is_floating_point() and reference.numel() and reference.shape == other.shape:
            largest = float(reference.double().abs().max())
            difference = float((reference.double() - other.double()).abs().max())
            found.append(difference / largest if largest else difference)
    # `max` would pass over NaN.
    return math.nan if any(map(math.isnan, found)) else max(found, default=None)


@dataclass(frozen=True)
class Times:
    """Median times of a forward in eval mode, measured in turns on the same inputs.

    Attributes:
        seconds: Name of a model -> seconds; empty if a forward takes too long to be timed.
        rounds: Number of forwards of each.
        threads: Number of threads.
        device: Where they ran.
    """

    seconds: Mapping[str, float]
    rounds: int
    threads: int
    device: str


def times(models: Mapping[str, nn.Module], call: Call) -> Times:
    """Measures the time of a forward of each model, in turns.

    Args:
        models: The models by name; in eval mode.
        call: The inputs.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    device = next((tensor.device for tensor in tensors_of((call.args, dict(call.kwargs)))), torch.device("cpu"))
    began, rounds = time.perf_counter(), 0
    with torch.no_grad():
        for number in range(_WARM_UP + _ROUNDS):
            for name, model in models.items():
                seconds = _timed(model, call, device)
                if number == 0 and seconds > _TOO_SLOW:
                    return Times({}, 0, torch.get_num_threads(), str(device))
                if number >= _WARM_UP:
                    found[name].append(seconds)
            rounds = number + 1 - _WARM_UP
            if rounds >= 3 and time.perf_counter() - began > _SECONDS:
                break
    medians = {name: statistics.median(values) for name, values in found.items()}
    return Times(medians, rounds, torch.get_num_threads(), str(device))


def _timed(model: nn.Module, call: Call, device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    call.run(model)
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shown(value: float) -> str:
    """Returns a figure as a reader wants it: four digits."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)
