"""`state_dict` and compression state: what is saved is enough, and nothing else is needed."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from torch import nn

from compress_core.errors import StateError
from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, fail, require
from compress_core.testing.changes import covers, plans_of, same_bits
from compress_core.testing.outputs import require_same, run, same
from compress_core.testing.tags import check

_IN_TRANSFORMS = (".weight_transforms.", ".activation_transforms.")
_TENSORS = "Keep tensors as parameters or buffers of transforms; they are saved with the model."


@check(without={"replaces_modules": "the plain model has other parameters"})
def check_loads_plain_state_dict(case: Case) -> None:
    """The state_dict of the plain model loads strictly, and changes no helper."""
    _, model = case.trained()
    helpers = {k: v.clone() for k, v in model.state_dict().items() if k not in case.state()}
    plain = {name: v * 0.5 + 0.125 if v.is_floating_point() else v for name, v in case.state().items()}
    try:
        model.load_state_dict(plain, strict=True)
    except RuntimeError as error:
        fail(f"the plain model's state_dict does not load: {error}", "Add tensors through transforms alone.")
    loaded = model.state_dict()
    for name, value in plain.items():
        require(
            same_bits(loaded[name], value), f"'{name}' is not what was loaded", "Do not write to weights on loading."
        )
    for name, value in helpers.items():
        require(same_bits(loaded[name], value), f"loading plain weights has changed '{name}'", _TENSORS)


@check()
def check_state_dict_names(case: Case) -> None:
    """Names of the plain model stay, further ones belong to transforms, and training adds none."""
    controller, model = case.compressed()
    names = list(model.state_dict())
    targets = [
        t for n, a in controller.algorithms.items() if a.replaces_modules for t in plans_of(controller)[n].targets
    ]
    for name in case.state():
        kept = name in names or any(covers(target, name) for target in targets)
        require(
            kept,
            f"'{name}' is not in the state_dict of the compressed model",
            "Leave parameters where they are, and register no state_dict hook.",
        )
    for name in names:
        allowed = name in case.state() or any(part in f".{name}" for part in _IN_TRANSFORMS)
        require(
            allowed or any(covers(target, name) for target in targets),
            f"the state_dict of the compressed model has '{name}', which belongs to no transform",
            "Keep tensors as parameters or buffers of transforms, and register nothing on the model itself.",
        )
    _require_own_tensors(model)
    trained = case.trained()[1].state_dict()
    new = sorted(set(trained) ^ set(names))
    require(
        not new,
        f"training adds or removes names of the state_dict: {new[:3]}",
        "Register all buffers and parameters of a transform when it is made, with their final shape.",
    )


def _require_own_tensors(model: nn.Module) -> None:
    saved = model.state_dict()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        others = [other for other in names[id(parameter)] if other in saved]
        if name not in saved and others and any(part in f".{name}" for part in _IN_TRANSFORMS):
            continue  # a transform at several places is saved for one of them
        require(
            name in saved and saved[name].data_ptr() == parameter.data_ptr(),
            f"state_dict()['{name}'] is not the parameter of that name",
            "Register no state_dict hook, and do not override state_dict in transforms.",
        )


@check()
def check_state_dict_round_trip(case: Case) -> None:
    """What a compressed model saves brings another one to the same outputs, through weights_only."""
    _, model = case.shared()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    _, other = case.compressed()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    expected = run(model, case.inputs)
    require_same(
        run(other, case.inputs), expected, "a model with the state_dict of another computes something else", _TENSORS
    )


@check()
def check_state_is_json_and_resumes(case: Case) -> None:
    """State and state_dict together, through JSON and weights_only, give the same model without any data."""
    controller, model = case.shared()
    state = json.loads(json.dumps(controller.get_compression_state(), allow_nan=False))
    resumed_controller, resumed = _resumed(case, state, case.model(), model)
    require_same(
        run(resumed, case.inputs),
        run(model, case.inputs),
        "the resumed model computes something else",
        "Save in compress_state what compress_load_state needs, and keep tensors in transforms.",
    )
    again = resumed_controller.get_compression_state()
    for name, entry in state["algorithms"].items():
        require(
            again["algorithms"][name] == entry,
            f"'{name}' saves another state when it has been resumed: {again['algorithms'][name]['state']}, and was "
            f"resumed with {entry['state']}",
            "Take back in compress_load_state everything that compress_state returns.",
        )
    require(
        resumed_controller.scheduler.get_state() == controller.scheduler.get_state()
        and resumed_controller.compression_stage() == controller.compression_stage(),
        "clock or stage of the resumed model are others",
        "Take back in compress_load_state what the stage depends on.",
    )


def _resumed(case: Case, state: Any, onto: nn.Module, saved: nn.Module) -> tuple[CompressionController, nn.Module]:
    try:
        controller, model = case.resumed(state, onto)
    except StateError as error:
        fail(
            f"the state does not fit another model of the same structure: {error}",
            "Plan from names and shapes, not from values of weights; if the values have to count, keep the plan of "
            "context.saved_plans when context.resuming, or declare Case(tags=['plans_from_weights']).",
        )
    model.load_state_dict(saved.state_dict(), strict=True)
    return controller, model


@check(without={"plans_from_weights": "the case declares that its plan depends on the weights"})
def check_resumes_on_other_weights(case: Case) -> None:
    """A state is resumed on a model with other weights, such as a freshly made one, before its own are loaded."""
    controller, model = case.shared()
    state = json.loads(json.dumps(controller.get_compression_state()))
    other = case.model()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.flatten().flip(0).view_as(tensor) * 1.5)
    _, resumed = _resumed(case, state, other, model)
    require_same(
        run(resumed, case.inputs),
        run(model, case.inputs),
        "a model that had other weights when it was resumed computes something else, with the same state_dict loaded",
        "Compute nothing from the weights when context.resuming that a state_dict does not bring back.",
    )


@check()
def check_continues_after_resuming(case: Case) -> None:
    """A resumed run goes on as the first would have: the same schedule, the same levels, the same loss."""
    controller, model = case.trained(1)
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed_controller, resumed = _resumed(case, state, case.model(), model)
    for epoch in range(1, 5):
        results = []
        for one, its_model in ((controller, model), (resumed_controller, resumed)):
            one.scheduler.epoch_step()
            for _ in range(case.steps):
                one.scheduler.step()
            results.append((run(its_model, case.inputs), one.compression_rate, one.compression_stage()))
        (outputs, rate, stage), (others, other_rate, other_stage) = results
        if not same(outputs, others) or (rate, stage) != (other_rate, other_stage):
            fail(
                f"in epoch {epoch} a run that was resumed after the first has the rate {other_rate:.4f} and "
                f"{other_stage.name}, one that was not {rate:.4f} and {stage.name}, or other outputs",
                "Return from compress_state what the next level depends on, and take it back in compress_load_state.",
            )
