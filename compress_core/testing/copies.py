"""Copies of a compressed model are models of their own, and two compressed models know nothing of one another."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, fail, require, train
from compress_core.testing.outputs import require_same, run, same
from compress_core.testing.tags import check

_STATE = (
    "Keep what a transform needs as its own parameters, buffers and plain attributes: no weak references, closures, "
    "class attributes or globals that hold the model or its tensors."
)


@check()
def check_deepcopy(case: Case) -> None:
    """A deep copy computes the same and shares nothing, in either direction."""
    _, model = case.trained()
    expected, twin = run(model, case.inputs), copy.deepcopy(model)
    _require_twin(twin, model, case, "a deep copy")
    theirs = dict(_tensors_in(model))
    for name, tensor in _tensors_in(twin):
        shared = name in theirs and tensor.numel() and tensor.data_ptr() == theirs[name].data_ptr()
        require(not shared, f"a deep copy shares the tensor '{name}' with the original", _STATE)
    _scramble(model)
    require_same(run(twin, case.inputs), expected, "a deep copy depends on the original's tensors", _STATE)


@check()
def check_pickle(case: Case) -> None:
    """A pickled model comes back as it was."""
    _, model = case.shared()
    _require_twin(_through(lambda: pickle.loads(pickle.dumps(model)), "pickle"), model, case, "a pickled model")


@check()
def check_torch_save(case: Case) -> None:
    """`torch.save` of the whole model works."""
    _, model = case.shared()
    file = io.BytesIO()
    _through(lambda: torch.save(model, file), "torch.save")
    file.seek(0)
    _require_twin(torch.load(file, weights_only=False), model, case, "a saved model")


def _through(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except Exception as error:
        fail(
            f"{what} of the compressed model fails: {type(error).__name__}: {error}",
            "Let transforms hold tensors and plain values, and let their classes stand at the top of a module.",
        )


def _require_twin(twin: nn.Module, model: nn.Module, case: Case, what: str) -> None:
    require(
        [type(module) for module in twin.modules()] == [type(module) for module in model.modules()],
        f"{what} has modules of other classes",
        "Do not override __reduce__ and __deepcopy__ in transforms.",
    )
    require_same(run(twin, case.inputs), run(model, case.inputs), f"{what} computes something else", _STATE)


def _tensors_in(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all tensors that a model's modules hold, in attributes, lists and dicts too."""
    for prefix, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name != "_modules":
                yield from _tensors_below(value, f"{prefix}.{name}", depth=3)


def _tensors_below(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth and isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors_below(part, f"{path}.{key}", depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors_below(part, f"{path}.{index}", depth - 1)


def _scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for _, tensor in _tensors_in(model):
            if tensor.is_floating_point() and not tensor.is_inference():
                tensor.zero_()


@check()
def check_models_are_independent(case: Case) -> None:
    """Compressing and training another model of the same config changes nothing about this one and its schedule."""
    alone = [_moment(case, *pair) for pair in _epochs(case)]
    beside = []
    for controller, model in _epochs(case):
        before = _moment(case, controller, model)
        other = case.model()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
        other_controller, _ = case.compressed(other)
        train(case, other_controller, other, 1)
        after, theirs = _moment(case, controller, model), _moment(case, other_controller, other)
        _require_same_moment(after, before, "compressing and training another model has changed this one")
        beside.append(after)
        controller.compression_stage()
        _require_same_moment(
            _moment(case, other_controller, other), theirs, "asking this model has changed another one"
        )
    for number, (first, second) in enumerate(zip(alone, beside, strict=True)):
        _require_same_moment(second, first, f"epoch {number} of this model is another one when there is a second model")


def _epochs(case: Case) -> Iterator[tuple[CompressionController, nn.Module]]:
    controller, model = case.compressed()
    for _ in range(2):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        yield controller, model


def _moment(case: Case, controller: CompressionController, model: nn.Module) -> dict[str, Any]:
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        "the outputs": run(model, case.inputs),
        "compression_rate": controller.compression_rate,
        "compression_stage": controller.compression_stage(),
        "the compression state": {n: e["state"] for n, e in controller.get_compression_state()["algorithms"].items()},
    }


def _require_same_moment(actual: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    for name, value in expected.items():
        found = actual.get(name)
        equal = same(found, value) if name == "the outputs" or isinstance(value, torch.Tensor) else found == value
        require(
            equal,
            f"{what}: {name}",
            "Keep state in instances (self, set in __init__), not in class attributes or globals.",
        )


@check()
def check_lets_go_of_the_model(case: Case) -> None:
    """When nobody holds model and controller any more, both are gone: no global, cache or hook keeps them."""
    # What there has been before is looked through by no collection: that would take most of the time.
    gc.freeze()
    try:
        watched = _watched(case)
        gc.collect()
    finally:
        gc.unfreeze()
    for what, reference in watched.items():
        require(
            reference() is None,
            f"the {what} lives on when nobody holds it any more",
            "Keep no model, controller or weight in globals, class attributes, caches or closures: hooks are given it.",
        )


def _watched(case: Case) -> dict[str, weakref.ref[Any]]:
    controller, model = case.trained(1)
    return {"model": weakref.ref(model), "controller": weakref.ref(controller)}
