"""What compression may change in a model, and what it has to leave alone."""

from __future__ import annotations

import random
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from torch import nn

from compress_core.errors import ConfigError
from compress_core.session.batch_recorder import is_recording
from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, fail, require
from compress_core.testing.changes import (
    OTHER_VALUES,
    Changes,
    covers,
    initializers_change_in_place,
    plans_of,
    same_bits,
    strings_in,
)
from compress_core.testing.fingerprint import hooks_of
from compress_core.testing.outputs import run, same
from compress_core.testing.tags import check
from compress_core.transforms.generated import base_class


@check()
def check_keeps_identity(case: Case) -> None:
    """The model is the same object of the same class, with the same parameter objects under the same names."""
    model = case.model()
    before = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    controller, compressed = case.compressed(model)
    require(compressed is model, "the model is another object now", "Change the model in place, and keep the object.")
    after, targets = dict(model.named_parameters()), _replaced_targets(controller)
    for name, parameter in before.items():
        if after.get(name) is not parameter and not any(covers(target, name) for target in targets):
            fail(
                f"the parameter '{name}' is another object now, or has another name",
                "Add a transform to it (mask_weight, add_weight_transform) instead of replacing it, or declare "
                "replaces_modules = True and plan it as a target.",
            )
    for name, module in model.named_modules():
        if name not in classes or any(covers(target, name) for target in targets if name):
            continue
        require(
            base_class(module) is classes[name] and isinstance(module, classes[name]),
            f"'{name or 'model'}' is a {type(module)}, and was a {classes[name]}",
            "Do not assign __class__ and do not replace modules; add transforms, or declare replaces_modules = True.",
        )


def _replaced_targets(controller: CompressionController) -> list[str]:
    names = [name for name, algorithm in controller.algorithms.items() if algorithm.replaces_modules]
    return [target for name in names for target in plans_of(controller)[name].targets]


@check()
def check_keeps_modes_and_flags(case: Case) -> None:
    """Creation leaves training modes, `requires_grad` and hooks as the user has set them, frozen parts too."""
    for training in (True, False):
        model = case.model().train(training)
        frozen = next(iter(model.parameters()), None)
        if frozen is not None:
            frozen.requires_grad_(False)
        before = _flags(model)
        after = _flags(case.compressed(model)[1])
        for name, flags in before.items():
            for flag, value in flags.items():
                if name in after and after[name].get(flag) != value:
                    fail(
                        f"'{name or 'model'}' has {flag} {after[name].get(flag)!r} after creation, and had {value!r}",
                        "Put back what you change for a while, and leave the rest to the user: use try/finally around "
                        "eval() and requires_grad_(), and add transforms instead of hooks.",
                    )


def _flags(model: nn.Module) -> dict[str, dict[str, Any]]:
    flags: dict[str, dict[str, Any]] = {
        name: {"training": module.training, "hooks": hooks_of(module, without=is_recording)}
        for name, module in model.named_modules()
    }
    for name, parameter in model.named_parameters():
        flags[name] = {"requires_grad": parameter.requires_grad, "hooks": hooks_of(parameter)}
    return flags


@check()
def check_changes_what_it_plans(case: Case) -> None:
    """Every target is changed, and nothing else is, but what the plan's details name together with a target."""
    model = case.model()
    changes = Changes(model, adapted=_is_adapted(case))
    controller, _ = case.compressed(model)
    found, aliases = changes.found(model), changes.aliases()
    plans = plans_of(controller)
    targets = [target for plan in plans.values() for target in plan.targets]
    named = {text for plan in plans.values() for text in strings_in(plan.details)}
    written = initializers_change_in_place(controller)
    for change, what in found.items():
        names = aliases.get(change, {change})
        if written and what == OTHER_VALUES:
            continue
        if not any(covers(target, name) for name in names for target in targets) and not named & names:
            fail(
                f"'{change.partition(':')[2] or change}' {what}, and no target of the plan is it: {targets[:5]}",
                "Change in compress_commit what compress_plan has returned (for name in plan.targets), or name in the "
                "plan's details what goes together with a target.",
            )
    if any(algorithm.changes_in_place for algorithm in controller.algorithms.values()):
        return  # values that are right already need not be written
    for target in targets:
        if not any(covers(target, alias) for change in found for alias in aliases.get(change, {change})):
            fail(
                f"'{target}' is a target of the plan, and compress_commit has not changed it",
                "Leave it out of Plan.targets and say why in Plan.skipped, or change it.",
            )


def _is_adapted(case: Case) -> bool:
    return any("initializer" in section for section in case.sections())


@check()
def check_honours_scopes(case: Case) -> None:
    """A layer in `ignored_scopes` is in no plan, and its tensors stay untouched."""
    controller, _ = case.compressed()
    targets = [target for plan in plans_of(controller).values() for target in plan.targets]
    names = dict(case.model().named_parameters(remove_duplicate=False))
    layers = [name.rpartition(".")[0] for name in names if any(covers(target, name) for target in targets)]
    if not any(layers):
        raise SkipTest("no target of this plan is a parameter of a layer that a scope could name")
    layer = next(layer for layer in layers if layer)
    sections = [{**section, "ignored_scopes": _with(section, layer)} for section in case.sections()]
    ignoring, model = case.with_sections(sections), case.model()
    changes = Changes(model, adapted=_is_adapted(case))
    try:
        controller, _ = ignoring.compressed(model)
    except ConfigError as error:
        raise SkipTest(f"without '{layer}' there is nothing left to compress: {error}") from error
    remedy = "Take the targets from context.plan_weights(model, self), or ask context.scope_filter(model, self)."
    for name, plan in plans_of(controller).items():
        for target in plan.targets:
            # What a layer returns may be somebody else's input: only weights are surely the layer's own.
            is_weight = target in names or target.endswith(("|WEIGHT", layer))
            parameters = [p for p in names if p.startswith(f"{layer}.") and covers(target, p) and is_weight]
            require(not parameters, f"'{target}' of {name} is planned, with '{layer}' in ignored_scopes", remedy)
    named = {text for plan in plans_of(controller).values() for text in strings_in(plan.details)}
    for change, what in changes.found(model).items():
        touched = change.startswith(f"{layer}.") and ":" not in change and change not in named
        require(
            not touched,
            f"'{change}' {what}, with '{layer}' in ignored_scopes: the plan honours the scopes, "
            "compress_commit does not",
            "Change in compress_commit what compress_plan has returned: for name in plan.targets.",
        )


def _with(section: Any, scope: str) -> list[str]:
    given = section.get("ignored_scopes", [])
    return [given, scope] if isinstance(given, str) else [*given, scope]


@check()
def check_is_deterministic(case: Case) -> None:
    """The same model and config give the same compressed model, whatever the global random generators say."""
    results = []
    for seed in (1, 2):
        model = case.model()
        with torch.random.fork_rng(devices=[]):
            _seed(seed)
            controller, _ = case.compressed(model)
            for epoch in range(3):
                _seed(seed + 10 * epoch)
                controller.scheduler.epoch_step()
                controller.scheduler.step()
        results.append((dict(model.state_dict()), run(model, case.inputs)))
    (first, outputs), (second, others) = results
    differing = [name for name in first if not same_bits(first[name], second[name])]
    require(
        not differing and same(outputs, others),
        f"two models made with the same weights and config differ, in {differing[:3] or 'their outputs'}",
        "Draw random numbers from a torch.Generator of your own, seeded from the config, and not from the global one.",
    )


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
