"""What `strip` has to leave: a plain model that computes the same, and nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, require
from compress_core.testing.changes import covers, own_modules, own_tensors, plans_of
from compress_core.testing.fingerprint import fingerprint, hooks_of
from compress_core.testing.outputs import require_close, require_same, run
from compress_core.testing.tags import check, tags_of
from compress_core.torch_internals import global_hooks
from compress_core.transforms.activation import activation_transforms
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, base_class

_BAKE = (
    "Write into the weights what a transform computes before you remove it in compress_strip, or leave weight "
    "transforms to the core, which bakes them."
)


@check()
def check_strip(case: Case) -> None:
    """`strip` gives a model that computes the same, which copies and pickles; the compressed one stays as it is."""
    controller, model = case.shared()
    expected = run(model, case.inputs)
    before = fingerprint(model)
    plain = controller.strip()
    changed = [key for key, value in fingerprint(model)["modules"].items() if before["modules"].get(key) != value]
    require(
        not changed and len(before["modules"]) == len(list(model.named_modules(remove_duplicate=False))),
        f"strip() has changed the compressed model, at {changed[:3]}",
        "Work in compress_strip on the model that is given to it, which is a copy, and not on self.model.",
    )
    _require_equal(case, plain, expected, "the stripped model")
    require_same(run(model, case.inputs), expected, "strip() has changed what the compressed model computes", _BAKE)
    _require_equal(case, copy.deepcopy(plain), expected, "a copy of the stripped model")
    _require_equal(case, pickle.loads(pickle.dumps(plain)), expected, "the pickled stripped model")


def _require_equal(case: Case, plain: nn.Module, expected: Any, what: str) -> None:
    if case.strip_tolerance:
        step = case.rounding_step
        require_close(run(plain, case.inputs), expected, case.strip_tolerance, what, _BAKE, rounding_step=step)
    else:
        require_same(run(plain, case.inputs), expected, f"{what} computes something else", _BAKE)


@check()
def check_strip_leaves_nothing(case: Case) -> None:
    """A stripped model has the classes, names, hooks, flags, modes and attributes of the plain model."""
    around = global_hooks()
    controller, model = case.trained()
    model.train()
    plain = case.model().train()
    _require_plain(case, controller, controller.strip(), plain)
    require(
        global_hooks() == around,
        "hooks for all modules or optimizers of the process are left",
        "Register no global hooks; add transforms, or declare needs_batch = True.",
    )


@check()
def check_strips_in_place(case: Case) -> None:
    """`strip(do_copy=False)` makes the model itself plain, with the same outputs."""
    controller, model = case.trained()
    expected = run(model, case.inputs)
    model.train()
    plain = controller.strip(do_copy=False)
    require(
        plain is model, "strip(do_copy=False) gave another model", "Change in compress_strip the model that is given."
    )
    _require_plain(case, controller, model, case.model().train())
    _require_equal(case, model, expected, "the model that was stripped in place")


def _require_plain(case: Case, controller: CompressionController, stripped: nn.Module, plain: nn.Module) -> None:
    keeps = "keeps_activations" in tags_of(case)
    left = [] if keeps else activation_transforms(stripped)
    require(
        not left,
        f"strip() leaves the activation transform '{left[0].key if left else ''}' at '{left[0].place if left else ''}'",
        "Remove it in compress_strip (strip_activation_transforms, handle.remove()), or declare that it belongs to the "
        "model: Case(tags=['keeps_activations']).",
    )
    replaced = [
        t for n, a in controller.algorithms.items() if a.replaces_modules for t in plans_of(controller)[n].targets
    ]

    def is_replaced(name: str) -> bool:
        return any(covers(target, name) for target in replaced)

    modules, tensors = own_modules(stripped), own_tensors(stripped)
    for name, module in own_modules(plain).items():
        if not is_replaced(name) or not name:
            _require_like(name or "model", modules.get(name), module, keeps)
    extra = [name for name in modules if name not in own_modules(plain) and not is_replaced(name)]
    require(
        not extra, f"strip() leaves modules: {extra[:3]}", "Remove in compress_strip what compress_commit has added."
    )
    for name, tensor in own_tensors(plain).items():
        if not is_replaced(name):
            _require_like_tensor(name, tensors.get(name), tensor)
    if not keeps and not replaced:
        require(
            list(stripped.state_dict()) == list(plain.state_dict()),
            f"the state_dict of the stripped model has other names: "
            f"{sorted(set(stripped.state_dict()) ^ set(plain.state_dict()))[:3]}",
            "Remove in compress_strip what compress_commit has added.",
        )


def _require_like(name: str, module: nn.Module | None, plain: nn.Module, keeps: bool) -> None:
    require(module is not None, f"'{name}' is gone from the stripped model", "Declare replaces_modules = True.")
    assert module is not None  # for the type checker
    cls = base_class(module) if keeps else type(module)
    require(
        cls is type(plain),
        f"'{name}' is a {cls.__module__}.{cls.__qualname__} after strip(), and was a {type(plain).__qualname__}",
        "Remove transforms with the functions that have added them, and assign no __class__.",
    )
    require(
        hooks_of(module) == hooks_of(plain) or (keeps and bool(hooks_of(plain)) == bool(hooks_of(module))),
        f"strip() leaves hooks at '{name}': {sorted(hooks_of(module))}",
        "Remove them in compress_strip, or better: add transforms, or declare needs_batch = True.",
    )
    require(
        module.training == plain.training,
        f"'{name}' has training = {module.training} after strip() of a model in training mode",
        "Put modes back in compress_strip.",
    )
    ours = set(module.__dict__) - {ACTIVATIONS_ATTRIBUTE}
    require(
        ours <= set(plain.__dict__),
        f"strip() leaves attributes at '{name}': {sorted(ours - set(plain.__dict__))}",
        "Keep what you have to remember in the algorithm or in transforms, or delete it in compress_strip.",
    )


def _require_like_tensor(name: str, tensor: torch.Tensor | None, plain: torch.Tensor) -> None:
    require(tensor is not None, f"'{name}' is gone from the stripped model", "Put parameters back in compress_strip.")
    assert tensor is not None  # for the type checker
    require(
        tensor.requires_grad == plain.requires_grad and type(tensor) is type(plain),
        f"'{name}' is a {type(tensor).__name__} with requires_grad = {tensor.requires_grad} after strip(), and was a "
        f"{type(plain).__name__} with {plain.requires_grad}",
        "Put back in compress_strip what compress_commit has set, and leave requires_grad to the user.",
    )
    require(
        not hooks_of(tensor),
        f"strip() leaves hooks at the tensor '{name}'",
        "Remove them in compress_strip, or better: add a transform, whose gradient you define.",
    )
