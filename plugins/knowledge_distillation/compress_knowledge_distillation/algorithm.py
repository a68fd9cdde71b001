"""The algorithm `knowledge_distillation`: adds a loss between the compressed model and a frozen teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import nn

from compress_core import Algorithm, AlgorithmConfig, Batch, ConfigError, Plan, Stage, Statistics, hookimpl
from compress_core.contract.algorithm import NeedsUncompressed
from compress_core.contract.clock import Clock
from compress_core.contract.context import Context
from compress_core.errors import Problem
from compress_core.saved import parsed
from compress_core.transforms import module_names
from compress_knowledge_distillation.config import KnowledgeDistillationConfig, WeightSchedule
from compress_knowledge_distillation.distance import Distance, distance_of_features, distance_of_outputs
from compress_knowledge_distillation.layers import LayerPair, matching, paired
from compress_knowledge_distillation.matching import Matched, matched_features, matched_outputs
from compress_knowledge_distillation.statistics import DistillationStatistics
from compress_knowledge_distillation.teacher import fingerprint, run_teacher

logger = logging.getLogger(__name__)

_SCOPES = ("ignored_scopes", "target_scopes", "validate_scopes")


class SavedDistillation(BaseModel):
    """The state that `compress_state` saves."""

    weight: float = Field(ge=0)
    teacher: str


class KnowledgeDistillation(Algorithm):
    """Knowledge distillation (Hinton, Vinyals & Dean 2015; features after Zagoruyko & Komodakis 2017).

    The loss compares what the last forward in training mode returned with what the teacher, in eval mode, returns for
    the same arguments. The teacher is the model that the user has registered as `TeacherArgs`, else the uncompressed
    model.
    """

    name = "knowledge_distillation"
    Config: ClassVar[type[AlgorithmConfig]] = KnowledgeDistillationConfig
    # It plans behind all others, which may replace layers that features name.
    stage = Stage.PRECISION
    changes_model = False
    needs_uncompressed: ClassVar[NeedsUncompressed] = "training"
    needs_batch = True

    config: KnowledgeDistillationConfig

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._students: list[list[str]] = []
        self._pairs: list[LayerPair] = []
        self._weight = 1.0
        self._teacher = ""
        # What was compared last -> its loss, detached and without the weight; read by nobody while training goes on.
        self._losses: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()

    # Lifecycle.

    @hookimpl
    def compress_configure(self, context: Context) -> None:
        """Refuses settings that contradict one another."""
        problems = _problems(self.config.unread())
        if problems:
            raise ConfigError(problems)
        # At this point every value that takes effect is read.
        for distance, entry in zip(self._distances, self.config.features, strict=True):
            _ = distance, entry.student, entry.teacher, entry.output
        if self._distance is not None:
            _ = self.config.outputs
        self._weight = _weight_at(self.config.weight_schedule, 0)
        context.refuse_unread(self)

    @hookimpl
    def compress_plan(self, model: nn.Module) -> Plan:
        """Finds the layers of the student that learn; nothing is changed."""
        names = module_names(model)
        entries = enumerate(self.config.features)
        self._students = [matching(entry.student, names, f"features.{n}.student") for n, entry in entries]
        return Plan((), details={"features": self._students})

    @hookimpl
    def compress_commit(self, model: nn.Module, context: Context) -> None:
        """Pairs the layers with those of the teacher, and asks for what they return."""
        teacher = context.teacher
        try:
            self._pairs = paired(self.config.features, self._students, teacher)
        except ConfigError as error:
            path, _ = context.section(self)
            raise ConfigError([Problem(f"{path}.{p.path}", p.message) for p in error.problems]) from error
        context.record_outputs(model, [pair.student for pair in self._pairs])
        self._teacher = fingerprint(teacher)

    @hookimpl
    def compress_epoch_step(self, clock: Clock) -> None:
        """Sets the weight of the epoch that begins."""
        self._weight = _weight_at(self.config.weight_schedule, clock.epoch)

    @hookimpl
    def compress_loss(self, batch: Batch, context: Context) -> torch.Tensor | None:
        """Returns the weighted sum of the losses of all pairs of outputs and layers; None while the weight is 0.

        Raises:
            ModelError: No output has a partner, a layer was not called, or tensors do not fit together.
        """
        if not self._weight:
            self._losses = {}
            return None
        outputs, features = run_teacher(context.teacher, batch, [pair.teacher for pair in self._pairs])
        found: dict[str, torch.Tensor] = {}
        for distance, matched in self._matched(batch, outputs, features):
            found[matched.what] = distance(matched.student, matched.teacher, matched.what)
        self._losses = {what: loss.detach() for what, loss in found.items()}
        return self._weight * torch.stack([loss.to(_widest(found)) for loss in found.values()]).sum()

    @hookimpl
    def compress_statistics(self, context: Context) -> Statistics:
        """Returns the losses of the last call of `controller.loss()` in this process."""
        return DistillationStatistics(
            losses={what: float(loss) for what, loss in self._losses.items()},
            weight=self._weight,
            teacher=type(context.teacher).__name__,
            teacher_parameters=sum(parameter.numel() for parameter in context.teacher.parameters()),
        )

    @hookimpl
    def compress_state(self) -> dict[str, Any]:
        """Returns the weight, and a mark of the teacher that the training began with."""
        return {"weight": self._weight, "teacher": self._teacher}

    @hookimpl
    def compress_load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the weight, and warns if the teacher is another one."""
        saved = parsed(SavedDistillation, state, f"compression_state.algorithms.{self.name}.state")
        if saved.teacher != self._teacher:
            logger.warning(
                "knowledge_distillation: the teacher has other weights than the one that this training began with. If "
                "that is not meant, give the same one: uncompressed_model= with its trained weights, or TeacherArgs"
            )
        self._weight, self._teacher = saved.weight, saved.teacher

    # Implementation.

    @property
    def _distance(self) -> Distance | None:
        return distance_of_outputs(self.config)

    @property
    def _distances(self) -> list[Distance]:
        return [distance_of_features(entry, number) for number, entry in enumerate(self.config.features)]

    def _matched(
        self, batch: Batch, outputs: Any, features: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[Distance, Matched]]:
        """Yields every pair of tensors with its loss."""
        if (distance := self._distance) is not None:
            pairs, remarks = matched_outputs(batch.outputs, outputs, self.config.outputs)
            for remark in remarks:
                self._warn(remark)
            for matched in pairs:
                yield distance, matched
        distances = self._distances
        for pair in self._pairs:
            entry = self.config.features[pair.entry]
            for matched in matched_features(pair, entry, batch.module_outputs, features):
                yield distances[pair.entry], matched

    def _warn(self, message: str) -> None:
        """Logs a warning, once for each text."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("knowledge_distillation: %s", message)


def _widest(found: Mapping[str, torch.Tensor]) -> torch.dtype:
    dtype = torch.float32
    for loss in found.values():
        dtype = torch.promote_types(dtype, loss.dtype)
    return dtype


def _weight_at(schedule: WeightSchedule, epoch: int) -> float:
    """Returns the weight of the loss in an epoch."""
    if schedule.type == "constant":
        return 1.0
    assert schedule.end_epoch is not None, "checked by compress_configure"
    done = (epoch - schedule.start_epoch) / (schedule.end_epoch - schedule.start_epoch)
    done = min(max(done, 0.0), 1.0)
    if schedule.type == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return schedule.initial + (schedule.target - schedule.initial) * done


def _problems(config: KnowledgeDistillationConfig) -> list[Problem]:
    """Returns what contradicts itself in a section; the core reports the values that nobody reads."""
    given, found = config.model_fields_set, []
    if config.type is None and not config.features:
        found.append(Problem("type", "is missing: mse, softmax or cosine between outputs; or name layers in features"))
    if "temperature" in given and config.type != "softmax":
        found.append(Problem("temperature", f"{config.temperature} is for the type softmax; remove it"))
    if "class_dim" in given and config.type not in ("softmax", "cosine"):
        found.append(Problem("class_dim", f"{config.class_dim} is for the types softmax and cosine; remove it"))
    found += [
        Problem(name, "distillation compares whole outputs and has no scopes; name layers in features, and remove this")
        for name in _SCOPES
        if name in given
    ]
    if "initializer" in given:
        found.append(
            Problem(
                "initializer", "distillation changes nothing that data could correct; move it to a section that does"
            )
        )
    for number, entry in enumerate(config.features):
        if entry.channel_dim is not None and entry.type == "mse":
            found.append(Problem(f"features.{number}.channel_dim", "is for the types cosine and attention; remove it"))
    return found + _problems_of_schedule(config.weight_schedule)


def _problems_of_schedule(schedule: WeightSchedule) -> list[Problem]:
    if schedule.type == "constant":
        return []
    if schedule.end_epoch is None:
        return [Problem("weight_schedule.end_epoch", "is missing: the epoch from which the factor is target")]
    if schedule.end_epoch <= schedule.start_epoch:
        return [
            Problem(
                "weight_schedule.end_epoch",
                f"is {schedule.end_epoch} and has to be after start_epoch, which is {schedule.start_epoch}",
            )
        ]
    if schedule.initial == schedule.target:
        return [Problem("weight_schedule.target", f"is {schedule.target} as initial; choose the type constant")]
    return []
