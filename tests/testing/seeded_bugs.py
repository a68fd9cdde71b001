"""Algorithms with one bug each: what a plugin author may well write, and the check that finds it.

A bug is a class derived from a clean one (`tests.testing.clean`), the check that has to find it, and what its message
has to say.
"""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compress_core import CompressionStage, Plan, Stage, TableStatistics, hookimpl, mask_weight
from compress_core.transforms import (
    ModuleOutput,
    WeightTransform,
    add_activation_transform,
    add_weight_transform,
    raw_parameter,
)
from compress_core.transforms.weight import remove_weight_transform
from tests.testing.clean import Ramp, Warm


@dataclass
class Bug:
    cls: type
    check: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)

    def classes(self):
        return (Ramp, self.cls) if issubclass(self.cls, Warm) else (self.cls,)


BUGS: dict[str, Bug] = {}


def bug(check, says, **settings):
    def add(cls):
        BUGS[cls.__name__] = Bug(cls, check, says, settings)
        return cls

    return add


# What is changed, and what is planned.


@bug("check_changes_what_it_plans", "'1.weight' has a transform, and no target of the plan is it")
class TouchesWhatItDoesNotPlan(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        mask_weight(model, "1.weight", key=self.name)


@bug("check_changes_what_it_plans", "is a target of the plan, and compress_commit has not changed it")
class PlansWhatItDoesNotTouch(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, Plan(plan.targets[:-1]))


@bug("check_honours_scopes", "the plan honours the scopes, compress_commit does not")
class CommitsPastTheScopes(Ramp):
    @hookimpl
    def compress_commit(self, model):
        super().compress_commit(model, Plan(("0.weight", "3.weight", "7.weight")))


@bug("check_honours_scopes", "is planned, with '0' in ignored_scopes. Take the targets from context.plan_weights")
class PlansPastTheScopes(Ramp):
    @hookimpl
    def compress_plan(self, model, context):
        context.plan_weights(model, self)
        return Plan(("0.weight", "3.weight", "7.weight"))


@bug("check_keeps_identity", "declare changes_in_place = True")
class WritesWeightsWithoutSayingSo(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        raw_parameter(model, plan.targets[0]).data.mul_(0.9)


@bug("check_keeps_identity", "must not change the model")
class ChangesTheModelWhenItPlans(Ramp):
    @hookimpl
    def compress_plan(self, model, context):
        model[0].weight.data.clamp_(-0.1, 0.1)
        return context.plan_weights(model, self)


@bug("check_keeps_identity", "replaces_modules = True")
class ReplacesModulesWithoutSayingSo(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, Plan(plan.targets[:-1]))
        model[7] = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 4))


@bug("check_keeps_identity", "not JSON-able")
class PlansTensors(Ramp):
    @hookimpl
    def compress_plan(self, model, context):
        return Plan(context.plan_weights(model, self).targets, details={"norm": model[0].weight.norm()})


@bug("check_keeps_modes_and_flags", "has requires_grad True after creation, and had False")
class UnfreezesParameters(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        for name in plan.targets:
            raw_parameter(model, name).requires_grad_(True)


@bug("check_keeps_modes_and_flags", "use try/finally around eval()")
class LeavesTheModelInEvalMode(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        model.eval()


@bug("check_is_deterministic", "Draw random numbers from a torch.Generator of your own")
class MasksFromTheGlobalGenerator(Ramp):
    def mask(self, model, name):
        shape = raw_parameter(model, name).shape
        mask_weight(model, name, torch.rand(shape) >= self.level, key=self.name)


# Training.


@bug("check_loss", "not a floating-point scalar; reduce it, for example with .mean()")
class ReturnsAVectorAsLoss(Ramp):
    @hookimpl
    def compress_loss(self, model):
        return raw_parameter(model, self.targets[0]).square().sum(dim=(1, 2, 3))


@bug("check_loss", "without a graph, so that training cannot lower it")
class DetachesItsLoss(Ramp):
    @hookimpl
    def compress_loss(self, model):
        return torch.tensor(float(super().compress_loss(model)))


@bug("check_loss", "compress_loss returned nan. Avoid")
class LosesInNaN(Ramp):
    @hookimpl
    def compress_loss(self, model):
        return super().compress_loss(model) * (torch.zeros(()) / torch.zeros(()))


@bug("check_loss", "the gradient of the loss for '0.weight' is NaN")
class HasNaNGradients(Ramp):
    @hookimpl
    def compress_loss(self, model):
        return (raw_parameter(model, "0.weight") * 0).square().sum().sqrt()


@bug("check_loss", "when it is asked for again. Compute the loss from the model as it is")
class CountsCallsInItsLoss(Ramp):
    calls = 0

    @hookimpl
    def compress_loss(self, model):
        self.calls += 1
        return super().compress_loss(model) * self.calls


@bug("check_loss", "Compute the loss anew whenever compress_loss is called")
class KeepsTheGraphOfItsLoss(Ramp):
    kept = None

    @hookimpl
    def compress_loss(self, model):
        if self.kept is None:
            self.kept = super().compress_loss(model)
        return self.kept


@bug("check_trains", "gets no gradient in training, and does in the plain model. Keep the graph")
class DetachesTheWeight(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_weight_transform(model, plan.targets[0], Detached(), stage=Stage.PRECISION, key=self.name + "_detached")


class Detached(nn.Module):
    def forward(self, weight):
        return weight.detach() * 1.0


@bug("check_statistics", "to_dict()['zeros'] is a Tensor, which JSON cannot hold. Return plain numbers")
class ReportsTensors(Ramp):
    @hookimpl
    def compress_statistics(self):
        return TableStatistics({"zeros": torch.tensor(self.compression_rate)})


@bug("check_statistics", "is nan, which JSON cannot hold")
class ReportsNaN(Ramp):
    @hookimpl
    def compress_statistics(self):
        return TableStatistics({"ratio": float("nan")})


@bug("check_statistics", "are others when they are asked for a second time")
class CountsItsReports(Ramp):
    asked = 0

    @hookimpl
    def compress_statistics(self):
        self.asked += 1
        return TableStatistics({"asked": self.asked})


@bug("check_ticks_leave_training_alone", "scheduler.epoch_step() has changed values: ['0.weight'")
class WritesWeightsInAnEpochStep(Ramp):
    @hookimpl
    def compress_epoch_step(self, model, clock):
        super().compress_epoch_step(model, clock)
        with torch.no_grad():
            raw_parameter(model, self.targets[0]).mul_(0.5)


@bug("check_ticks_leave_training_alone", "changed the optimizer's settings. Leave the optimizer to the user")
class TurnsDownTheLearningRate(Ramp):
    @hookimpl
    def compress_step(self, model, clock):
        if clock.step != 2:  # looking through all objects takes time
            return
        own = {id(parameter) for parameter in model.parameters()}
        for optimizer in [o for o in gc.get_objects() if type(o) is torch.optim.SGD]:
            for group in optimizer.param_groups:
                if own & {id(parameter) for parameter in group["params"]}:
                    group["lr"] *= 0.5


@bug("check_ticks_leave_training_alone", "scheduler.step() has changed gradients")
class ClipsGradients(Ramp):
    @hookimpl
    def compress_step(self, model):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-6)


@bug("check_ticks_leave_training_alone", "scheduler.step() has changed generators")
class DrawsInAStep(Ramp):
    @hookimpl
    def compress_step(self):
        torch.rand(3)


@bug("check_ticks_leave_training_alone", "compression_stage() has changed modes")
class MeasuresInEvalMode(Ramp):
    @hookimpl
    def compress_stage(self):
        self.model.eval()
        return super().compress_stage()


@bug("check_stage_is_measured", "FULLY_COMPRESSED at creation, with")
class IsFullFromTheBeginning(Ramp):
    @hookimpl
    def compress_stage(self):
        return CompressionStage.FULLY_COMPRESSED


@bug("check_stage_is_measured", "the model computes what it does without its transforms")
class NeverReachesItsTarget(Ramp):
    def set_level(self, model, level):
        self.level = level


@bug("check_stage_is_measured", "UNCOMPRESSED, and the transforms change what the model computes")
class NeverSaysThatItHasBegun(Ramp):
    @hookimpl
    def compress_stage(self):
        return CompressionStage.UNCOMPRESSED


@bug("check_rate_is_counted", "instead of returning what was asked for")
class RepeatsWhatWasAskedFor(Ramp):
    @property
    def compression_rate(self):
        return self.config.level


@bug("check_repeats_an_epoch", "Compute the level from clock.epoch")
class CountsItsEpochs(Ramp):
    epoch = -1

    @hookimpl
    def compress_epoch_step(self, model):
        self.epoch += 1
        self.set_level(model, self.level_at(self.epoch))


# State and copies.


@bug("check_continues_after_resuming", "Return from compress_state what the next level depends on")
class SavesNoState(Ramp):
    level = rounds = 0

    @hookimpl
    def compress_epoch_step(self, model, clock):
        self.rounds = max(self.rounds + 1, 0)
        self.set_level(model, self.level_at(self.rounds - 1))

    @hookimpl
    def compress_state(self):
        return {}

    @hookimpl
    def compress_load_state(self):
        pass


@bug("check_state_is_json_and_resumes", "saves another state when it has been resumed")
class IgnoresItsState(Ramp):
    @hookimpl
    def compress_load_state(self):
        pass


@bug("check_state_is_json_and_resumes", "not JSON-able")
class SavesTensors(Ramp):
    @hookimpl
    def compress_state(self):
        return {"level": torch.tensor(self.level)}


@bug("check_resumes_on_other_weights", "Plan from names and shapes, not from values of weights")
class PlansFromWeights(Ramp):
    @hookimpl
    def compress_plan(self, model, context):
        plan = context.plan_weights(model, self)
        norm = float(model[0].weight.detach().norm())
        return Plan(plan.targets, plan.skipped, {"norm": norm})


@bug("check_resumes_on_other_weights", "with the same state_dict loaded")
class KeepsScalesOutsideTheStateDict(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        scale = float(raw_parameter(model, plan.targets[0]).detach().abs().max())
        add_weight_transform(model, plan.targets[0], Clamp(scale), stage=Stage.PRECISION, key=self.name + "_clamp")


class Clamp(nn.Module):
    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, weight):
        return weight.clamp(-0.5 * self.bound, 0.5 * self.bound)


@bug("check_state_dict_names", "training adds or removes names of the state_dict")
class RegistersBuffersInForward(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_weight_transform(model, plan.targets[0], Late(), stage=Stage.PRECISION, key=self.name + "_late")


class Late(nn.Module):
    def forward(self, weight):
        if self.training and not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(1))
        return weight * 1.0


@bug("check_state_dict_names", "'0.weight' is not in the state_dict of the compressed model")
class RenamesKeys(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        model[0].register_state_dict_post_hook(rename)


def rename(module, state, prefix, metadata):
    state[f"{prefix}raw"] = state.pop(f"{prefix}weight")


@bug("check_state_dict_names", "which belongs to no transform. Keep tensors as parameters or buffers of transforms")
class RegistersOnTheModel(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        model.register_buffer("level", torch.zeros(()))


class OfOriginal(nn.Module):
    """Multiplies a weight by the number 1, which it asks the model for that it was made for."""

    def __init__(self, model):
        super().__init__()
        self.model = weakref.ref(model)

    def forward(self, weight):
        return weight * (1.0 + self.model()[0].bias.detach()[0])

    def __deepcopy__(self, memo):
        twin = OfOriginal(self.model())
        memo[id(self)] = twin
        return twin


@bug("check_deepcopy", "a deep copy depends on the original's tensors")
class RefersToTheOriginal(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_weight_transform(model, plan.targets[0], OfOriginal(model), stage=Stage.PRECISION, key=self.name + "_of")


@bug("check_pickle", "Let transforms hold tensors and plain values")
class HoldsALock(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        transform = nn.Identity()
        transform.lock = Locked()
        add_weight_transform(model, plan.targets[0], transform, stage=Stage.PRECISION, key=self.name + "_locked")


class Locked:
    """Something that can be copied and not pickled, as a lock, a file or a function within a function."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("cannot pickle 'Locked' object")


@bug("check_deepcopy", "a deep copy shares the tensor")
class SharesTensorsBetweenCopies(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_weight_transform(model, plan.targets[0], Shared(), stage=Stage.PRECISION, key=self.name + "_shared")


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.ones(1))

    def forward(self, weight):
        return weight * self.one

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin


_models = []


@bug("check_lets_go_of_the_model", "Keep no model, controller or weight in globals")
class KeepsTheModelInAGlobal(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        _models[:] = [model]


@bug("check_models_are_independent", "Keep state in instances")
class KeepsStateInItsClass(Ramp):
    shared: dict[str, Any] = {}  # noqa: RUF012 - that is the bug

    @property
    def level(self):
        return self.shared.get("level", 0.0)

    @level.setter
    def level(self, level):
        self.shared["level"] = level


# What is left after strip, and after a failure.


# What tests have to remove themselves: no rollback reaches it.
handles = []


class Watching:
    def __call__(self, module, args, output):
        return None


@bug("check_strip_leaves_nothing", "strip() leaves hooks at '0': ['_forward_hooks']")
class LeavesAHook(Ramp):
    @hookimpl
    def compress_calibrate(self, model):
        model[0].register_forward_hook(Watching())


def same_gradient(gradient):
    return gradient


@bug("check_keeps_modes_and_flags", "'3.weight' has hooks")
class LeavesAHookOfATensor(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        raw_parameter(model, plan.targets[1]).register_hook(same_gradient)


@bug("check_strip_leaves_nothing", "strip() leaves the activation transform 'mine' at '2: output'")
class LeavesAnActivationTransform(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_activation_transform(model, ModuleOutput("2"), nn.Hardtanh(), stage=Stage.PRECISION, key=self.name)


@bug("check_strip_leaves_nothing", "strip() leaves attributes at '0': ['importance']")
class LeavesAnAttribute(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        model[0].importance = [1.0, 2.0]


@bug("check_strip_leaves_nothing", "with requires_grad = False after strip(), and was a Parameter with True")
class LeavesWeightsFrozen(Ramp):
    @hookimpl
    def compress_strip(self, model):
        for name in self.targets:
            raw_parameter(model, name).requires_grad_(False)


@bug("check_strip_leaves_nothing", "has training = False after strip() of a model in training mode")
class StripsInEvalMode(Ramp):
    @hookimpl
    def compress_strip(self, model):
        model.eval()


class Quick(nn.Linear):
    """A class that an algorithm has made."""


@bug("check_strip_leaves_nothing", "after strip(), and was a Linear")
class LeavesItsOwnClass(Ramp):
    @hookimpl
    def compress_strip(self, model):
        for name in self.targets:
            remove_and_bake(model, name, self.name)
        model[7].__class__ = Quick


def remove_and_bake(model, name, key):
    layer, _, parameter = name.rpartition(".")
    weight = getattr(model.get_submodule(layer), parameter).detach()
    remove_weight_transform(model, name, key)
    raw_parameter(model, name).data.copy_(weight)


@bug("check_strip", "Write into the weights what a transform computes before you remove it")
class StripsWithoutBaking(Ramp):
    @hookimpl
    def compress_strip(self, model):
        for name in self.targets:
            remove_weight_transform(model, name, self.name)


@bug("check_strip", "Work in compress_strip on the model that is given to it")
class StripsTheWrongModel(Ramp):
    @hookimpl
    def compress_strip(self):
        for name in self.targets:
            remove_and_bake(self.model, name, self.name)


@bug("check_rolls_back_from_the_loader", "and nobody cared. Let exceptions pass", data=True)
class SwallowsExceptions(Ramp):
    @hookimpl
    def compress_calibrate(self, model, context):
        try:
            for batch, _ in context.calibration_data("mine").batches(64):
                context.calibration_data("mine").call(model, batch)
        except BaseException:
            self.data = None


@bug("check_rolls_back_from_every_hook", "global hooks._global_forward_hooks is not as it was")
class HooksEveryModuleThereIs(Ramp):
    @hookimpl
    def compress_plan(self, model, context):
        handles.append(nn.modules.module.register_module_forward_hook(Watching()))
        return context.plan_weights(model, self)


@bug("check_strip_leaves_nothing", "hooks for all modules or optimizers of the process are left")
class HooksEveryOptimizerThereIs(Ramp):
    @hookimpl
    def compress_epoch_step(self, model, clock):
        super().compress_epoch_step(model, clock)
        if clock.epoch == 0:
            handles.append(register_optimizer_step_post_hook(Watching()))


# Composition, compilation, export.


@bug("check_with_filter_pruning", "is refused: compress_commit() of the algorithm 'mine'")
class ThrowsAwayWhatOthersHaveAdded(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        for name in plan.targets:
            if hasattr(model.get_submodule(name.rpartition(".")[0]), "weight_transforms"):
                remove_weight_transform(model, name, "filter_pruning")
        super().compress_commit(model, plan)


@bug("check_with_quantization", "there is no transform with the key 'mine'. Use your own name")
class UsesAnotherKey(Ramp):
    @property
    def compression_rate(self):
        return None

    def mask(self, model, name):
        mask_weight(model, name, torch.ones(raw_parameter(model, name).shape), key="mask")

    @hookimpl
    def compress_statistics(self):
        return TableStatistics({})


@bug("check_with_filter_pruning", "follows")
class DoesNotSayHowItsTensorsFollow(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        for name in plan.targets:
            scale = torch.ones_like(raw_parameter(model, name).detach())
            add_weight_transform(model, name, Scaled(scale), stage=Stage.PRECISION, key=self.name + "_scaled")


class Scaled(WeightTransform):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, weight):
        return weight * self.scale


@bug("check_compile_eval", "no branches on values")
class BranchesOnValues(Ramp):
    @hookimpl
    def compress_commit(self, model, plan):
        super().compress_commit(model, plan)
        add_weight_transform(model, plan.targets[0], Branching(), stage=Stage.PRECISION, key=self.name + "_if")


class Branching(nn.Module):
    def forward(self, weight):
        return weight if weight.detach().abs().max() > 1e-9 else weight * 2


@bug("check_export_onnx", "DisagreementError")
class ExportsWithoutItsMasks(Ramp):
    @hookimpl
    def compress_export(self, model, target):
        for name in self.targets:
            remove_weight_transform(model, name, self.name)


# Initializers.


@bug("check_changes_what_it_plans", "'0.bias' has other values", initializer=True)
class InitializerThatWritesWeights(Warm):
    @hookimpl
    def compress_initialize(self, model):
        model[0].bias.data.add_(1)
