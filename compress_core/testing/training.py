"""What happens in a training loop: losses, schedules, statistics, and what they must leave alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import SkipTest

import torch
from torch import nn

from compress_core.contract.stages import CompressionStage
from compress_core.errors import TransformError
from compress_core.session.controller import CompressionController
from compress_core.testing.case import Case, fail, require, train
from compress_core.testing.changes import own_modules, own_tensors, plans_of, same_bits
from compress_core.testing.fingerprint import generators, hooks_of
from compress_core.testing.outputs import leaves, run, same, scalar
from compress_core.testing.tags import check
from compress_core.transforms import activation_transforms, raw_parameter
from compress_core.transforms.weight import transformed_weight


@check()
def check_trains(case: Case) -> None:
    """A few epochs of the documented training loop leave finite weights, and gradients that the plain model has."""
    plain, (controller, model) = case.model().train(), case.compressed()
    torch.autograd.backward(scalar(plain(*case.inputs)))
    train(case, controller, model)
    values = dict(model.named_parameters())
    # The task's loss alone: an algorithm's own would give gradients to weights that its transforms have detached.
    model.train().zero_grad()
    torch.autograd.backward(scalar(model(*case.inputs)))
    for name, parameter in values.items():
        require(
            bool(parameter.isfinite().all()),
            f"after {case.epochs} epochs of training '{name}' holds NaN or infinity",
            "Look at what compress_loss returns and at the gradients of your transforms: do not divide by 0.",
        )
    for name, parameter in plain.named_parameters():
        reached = name not in values or parameter.grad is None or values[name].grad is not None
        require(
            reached,
            f"'{name}' gets no gradient in training, and does in the plain model",
            "Keep the graph in your transforms: compute with the weight they are given, not its .data.",
        )
    outputs = leaves(run(model, case.inputs))
    require(
        all(bool(leaf.isfinite().all()) for leaf in outputs if leaf.is_floating_point()),
        "after training the model returns NaN or infinity",
        "Look at the levels that compress_epoch_step sets, and at divisions in your transforms.",
    )


@check(needs=["has_loss"])
def check_loss(case: Case) -> None:
    """The loss is a finite scalar that can be differentiated in each step anew, and asking for it changes nothing."""
    controller, model = case.compressed()
    model.train()
    for step in range(2 * case.steps):
        if step % case.steps == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        model.zero_grad()
        outputs = model(*case.inputs)
        loss = controller.loss()
        _require_usable(loss)
        again = controller.loss(outputs, *case.inputs)
        require(
            torch.equal(loss, again),
            f"the loss of one step is {loss.item():.6g}, and {again.item():.6g} when it is asked for again",
            "Compute the loss from the model as it is; count steps in compress_step, and do not draw random numbers.",
        )
        _differentiate(loss)
        for name, parameter in model.named_parameters():
            require(
                parameter.grad is None or bool(parameter.grad.isfinite().all()),
                f"the gradient of the loss for '{name}' is NaN or infinite",
                "Avoid the square root, logarithm and quotient of 0: add a small number, or clamp.",
            )


def _differentiate(loss: torch.Tensor) -> None:
    try:
        if loss.requires_grad:
            torch.autograd.backward(loss)
    except RuntimeError as error:
        fail(
            f"the gradient of the loss cannot be computed: {error}",
            "Compute the loss anew whenever compress_loss is called, and keep no part of its graph.",
        )


def _require_usable(loss: torch.Tensor) -> None:
    require(
        bool(loss.isfinite()),
        f"compress_loss returned {loss.item()}",
        "Avoid the square root, logarithm and quotient of 0: add a small number, or clamp.",
    )
    require(
        loss.requires_grad or not loss.item(),
        f"compress_loss returned {loss.item():.6g} without a graph, so that training cannot lower it",
        "Compute it from parameters (or from batch.outputs) without .item(), .detach() and no_grad(), or return None.",
    )


@check()
def check_statistics(case: Case) -> None:
    """Statistics are JSON-able figures and printable tables, are the same when asked for twice, and change nothing."""
    controller, model = case.shared()
    before = _everything(model)
    parts = {name: controller.statistics().parts[name] for name in controller.statistics().parts}
    for name, part in parts.items():
        for path, value in _not_json(part.to_dict()):
            fail(
                f"statistics of '{name}': to_dict(){path} is {_shown(value)}, which JSON cannot hold",
                "Return plain numbers, strings, lists and dicts from compress_statistics: int(x) or float(x) of "
                "tensors, None for what is not known.",
            )
        json.dumps(part.to_dict(), allow_nan=False)
        for table in part.tables():
            cells = [cell for row in table.rows for cell in row]
            odd = [cell for cell in cells if isinstance(cell, (torch.Tensor, nn.Module))]
            require(
                not odd and isinstance(table.to_str(), str),
                f"statistics of '{name}': the table '{table.title}' holds tensors: {odd[:2]}",
                "Put numbers and strings into tables: int(x) or float(x) of tensors.",
            )
    _refuse_changes(before, model, "statistics()", "Only measure in compress_statistics.")
    second = {name: part.to_dict() for name, part in controller.statistics().parts.items() if name in parts}
    for name, part in parts.items():
        require(
            part.to_dict() == second[name],
            f"statistics of '{name}' are others when they are asked for a second time",
            "Measure what is there, and count nothing in compress_statistics; a report must not refer to live tensors.",
        )


def _not_json(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"{path}'s key", key
            yield from _not_json(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _not_json(part, f"{path}[{index}]")
    elif not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        yield path, value


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, (int, float)) else repr(value)


@check()
def check_ticks_leave_training_alone(case: Case) -> None:
    """Schedule, loss, stage and state write to no weight, gradient, mode, optimizer or random generator."""
    controller, model = case.compressed()
    optimizer = train(case, controller, model, 1)
    in_place = any(algorithm.changes_in_place for algorithm in controller.algorithms.values())
    scheduler = controller.scheduler
    ticks: dict[str, Callable[[], object]] = {
        "scheduler.epoch_step()": scheduler.epoch_step,
        "scheduler.step()": scheduler.step,
    }
    asked: dict[str, Callable[[], object]] = {
        "loss()": controller.loss,
        "compression_stage()": controller.compression_stage,
        "compression_rate": lambda: controller.compression_rate,
        "get_compression_state()": controller.get_compression_state,
    }
    for what, call in (ticks | asked).items():
        before, state = _everything(model, optimizer), optimizer.state_dict()
        call()
        after = _everything(model, optimizer)
        allowed = ("transforms", "values") if what in ticks and in_place else ("transforms",) if what in ticks else ()
        _compare(before, after, what, allowed)
        require(
            state["param_groups"] == optimizer.state_dict()["param_groups"],
            f"{what} has changed the optimizer's settings",
            "Leave the optimizer to the user: what an algorithm learns are parameters of its transforms, and its rates "
            "are context.lr_multiplier(self).",
        )


_REMEDIES = {
    "values": "Change masks and other tensors of your transforms, not weights; compress_commit may write to weights "
    "when the class declares changes_in_place = True.",
    "gradients": "Leave gradients to the training loop: what is to be added to them belongs into compress_loss.",
    "modes": "Put back what you change for a while (try/finally around eval() and requires_grad_()).",
    "hooks": "Use transforms instead of hooks; what is needed of the batch comes with needs_batch = True.",
    "modules": "Change the structure in compress_commit, and only there.",
    "transforms": "Change transforms in compress_epoch_step, compress_step and forward, and only measure elsewhere.",
    "optimizer": "Leave the optimizer to the user: what an algorithm learns are parameters of its transforms.",
    "generators": "Draw random numbers from a torch.Generator of your own, seeded from the config.",
}


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, dict[str, Any]]:
    own, names = own_tensors(model), own_modules(model)
    helpers = {name: t for name, t in model.state_dict().items() if name not in own}
    named: dict[str, nn.Module | torch.Tensor] = {**dict(model.named_parameters()), **dict(names)}
    return {
        "values": {name: t.detach().clone() for name, t in own.items()},
        "gradients": {name: t.grad.clone() for name, t in own.items() if t.grad is not None},
        "modes": {n: m.training for n, m in names.items()} | {n: t.requires_grad for n, t in own.items()},
        "hooks": {name: hooks_of(owner) for name, owner in named.items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "transforms": {name: t.detach().clone() for name, t in helpers.items()},
        "optimizer": {} if optimizer is None else _optimizer_tensors(optimizer),
        "generators": generators(),
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{number}.{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for number, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def _refuse_changes(before: dict[str, dict[str, Any]], model: nn.Module, what: str, remedy: str) -> None:
    _compare(before, _everything(model), what, (), remedy)


def _compare(
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    what: str,
    allowed: tuple[str, ...],
    remedy: str = "",
) -> None:
    for kind, entries in before.items():
        if kind in allowed or (kind == "optimizer" and not after[kind]):
            continue
        keys = [key for key in {**entries, **after[kind]} if not _equal(entries.get(key), after[kind].get(key))]
        require(not keys, f"{what} has changed {kind}: {keys[:3]}", remedy or _REMEDIES[kind])


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return same_bits(left, right)
    return bool(left == right) if type(left) is type(right) else False


@check()
def check_stage_is_measured(case: Case) -> None:
    """Stage and rate say what has been reached: full is full for good, and the share that is gone can be counted."""
    controller, model = case.compressed()
    history = [_progress(controller, model)]
    for _ in range(case.schedule_epochs):
        controller.scheduler.epoch_step()
        for _ in range(case.steps):
            controller.scheduler.step()
        history.append(_progress(controller, model))
    for moment, (stage, zeros, _) in enumerate(history):
        later = max(count for _, count, _ in history[moment:])
        if stage == CompressionStage.FULLY_COMPRESSED and later > zeros:
            when = "at creation" if moment == 0 else f"after {moment} epochs"
            fail(
                f"compress_stage says FULLY_COMPRESSED {when}, with {zeros} zeros in the targets, and later there are "
                f"{later}",
                "Return FULLY_COMPRESSED when the level that has been reached is the target's, and "
                "PARTIALLY_COMPRESSED or UNCOMPRESSED before.",
            )
    stage, _, changed = history[-1]
    if not any(
        algorithm.replaces_modules or algorithm.changes_in_place for algorithm in controller.algorithms.values()
    ):
        require(
            stage != CompressionStage.FULLY_COMPRESSED or changed or bool(activation_transforms(model)),
            f"compress_stage says FULLY_COMPRESSED after {case.schedule_epochs} epochs, and the model computes what it "
            "does without its transforms",
            "Measure the stage on the model, and see that the schedule reaches its target.",
        )
        require(
            stage != CompressionStage.UNCOMPRESSED or not changed,
            "compress_stage says UNCOMPRESSED, and the transforms change what the model computes",
            "Return PARTIALLY_COMPRESSED from the first level above 0 on.",
        )


def _progress(controller: CompressionController, model: nn.Module) -> tuple[CompressionStage, int, bool]:
    """Returns the stage, the zeros in the targets' weights, and whether transforms change any of these."""
    zeros, changed = 0, False
    for weight, raw in _weights(controller, model):
        zeros += int((weight == 0).sum())
        changed = changed or not same_bits(weight, raw)
    return controller.compression_stage(), zeros, changed


def _weights(controller: CompressionController, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the weights of the targets that are parameters: as computed with, and as stored."""
    for plan in plans_of(controller).values():
        for target in plan.targets:
            try:
                raw = raw_parameter(model, target).detach()
            except (TransformError, AttributeError):
                continue
            yield transformed_weight(model, target, None).detach(), raw


@check(needs=["sparsity"], without={"replaces_modules": "there is no share of zeros in modules that are new"})
def check_rate_is_counted(case: Case) -> None:
    """`compression_rate` of sparsity is the share of zeros in the targets, at creation and along the schedule."""
    controller, model = case.compressed()
    for epoch in range(-1, case.schedule_epochs):
        if epoch >= 0:
            controller.scheduler.epoch_step()
            controller.scheduler.step()
        rates = [algorithm.compression_rate for algorithm in controller.algorithms.values()]
        if len(rates) != 1 or rates[0] is None:
            raise SkipTest("there is not one algorithm with a compression_rate")
        weights = [weight for weight, _ in _weights(controller, model)]
        total = sum(weight.numel() for weight in weights)
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        # Weights that are zero themselves may be counted or not.
        natural = sum(int((raw == 0).sum()) for _, raw in _weights(controller, model))
        require(
            zeros - natural - 1 <= rates[0] * total <= zeros + 1,
            f"compression_rate is {rates[0]:.4f} when {epoch + 1} epochs have begun, and {zeros} of {total} weights "
            f"are zero ({zeros / max(total, 1):.4f})",
            "Count in compression_rate what is zero now, instead of returning what was asked for.",
        )


@check()
def check_repeats_an_epoch(case: Case) -> None:
    """Beginning an epoch again (a resumed run does) gives the same model as beginning it once."""
    controller, model = case.compressed()
    for epoch in range(3):
        controller.scheduler.epoch_step(epoch)
        once, stage = run(model, case.inputs), controller.compression_stage()
        controller.scheduler.epoch_step(epoch)
        require(
            same(run(model, case.inputs), once) and controller.compression_stage() == stage,
            f"beginning epoch {epoch} twice gives another model than beginning it once",
            "Compute the level from clock.epoch in compress_epoch_step, instead of counting calls.",
        )
