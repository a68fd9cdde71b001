"""Makes the plan of a compression, on a copy of the model, which then is thrown away."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from torch import nn

from compress_core.config.accuracy_aware import ADAPTIVE
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.footprint import Footprint, TensorFootprint, shape_in_words
from compress_core.contract.initializer import Initializer
from compress_core.contract.levels import has_settable_rate
from compress_core.data.forwards import without_traces
from compress_core.data.rng import RngState
from compress_core.errors import CompressionError, DataError, DecidedFromDataError, ModelError
from compress_core.session.compression_plan import CompressionPlan, PlannedAlgorithm, PlannedTarget
from compress_core.session.controller import CompressionController
from compress_core.session.lifecycle import Lifecycle
from compress_core.session.uncompressed import UncompressedModel
from compress_core.trace import Trace
from compress_core.transforms.python_state import copied

_SILENT = "says nothing of its effect on size, so the figures are without it"

_CALIBRATES = "is calibrated on the compressed model, such as ranges, on data if it needs any"
_SPREAD = "zeros are counted as if spread evenly over the channels that stay and those that go"


def make_plan(model: nn.Module, lifecycle: Lifecycle) -> CompressionPlan:
    """Returns what the algorithms would do to a model.

    They plan and commit on a copy, as they do at the creation; calibration and initializers do not run. The copy takes
    as much memory as the snapshot that the creation makes.

    Args:
        model: The model; it is not touched.
        lifecycle: Its algorithms, configured, with a context for planning.

    Raises:
        CompressionError: What the creation would raise.
        ModelError: The model cannot be copied.
    """
    rng = RngState(lifecycle.context.generators())
    try:
        # The copy shares with the model whatever `deepcopy` leaves: globals, class attributes, caches.
        with without_traces(model, hooks=True, parameters=False):
            return _Planning(_copy_of(model), lifecycle).run()
    finally:
        rng.restore()


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise ModelError(
            f"a plan is made on a copy of the model, which cannot be copied: {type(error).__name__}: {error}"
        ) from error


class _Planning:
    """One run of the pipeline on a copy.

    Args:
        model: The copy.
        lifecycle: The algorithms.
    """

    def __init__(self, model: nn.Module, lifecycle: Lifecycle) -> None:
        self._model, self._lifecycle = model, lifecycle
        self._entries: list[PlannedAlgorithm] = []

    def run(self) -> CompressionPlan:
        """Returns the plan."""
        model, lifecycle = self._model, self._lifecycle
        name = type(model).__name__
        uncompressed = UncompressedModel(lifecycle)
        CompressionController(model, lifecycle, uncompressed)  # sets the services of the context
        trace, why = self._traced()
        before = Footprint.of_model(model, trace)
        if why:
            before = replace(before, open={"operations": why})
        self._before = self._start = self._end = before
        corrections = {name: self._correction(entry) for name, entry in lifecycle.initializers.items()}
        for number, group in enumerate(lifecycle.pipeline()):
            undecided = {algorithm.name: self._plan(algorithm) for algorithm in group}
            if number == 0:
                self._observe()
                uncompressed.before_commit(model)
            for algorithm in group:
                self._commit(algorithm, undecided[algorithm.name])
        lifecycle.context.kept_trace.close()
        lifecycle.close_planned_ledger()
        calibrating = [a.name for a in lifecycle.algorithms if lifecycle.implements("compress_calibrate", a)]
        return CompressionPlan(
            name,
            tuple(self._entries),
            dict.fromkeys(calibrating, _CALIBRATES) | {name: words for name, words in corrections.items() if words},
            lifecycle.context.ledger,
            before,
            self._start,
            self._end,
        )

    def _traced(self) -> tuple[Trace | None, str]:
        """Returns a trace of the model, or why there is none."""
        try:
            return self._lifecycle.context.trace(self._model, "operations"), ""
        except DataError:
            return None, "there is no example input to count them with"
        except CompressionError as error:  # which the creation raises if an algorithm needs the trace
            return None, f"the model cannot be traced: {' '.join(str(error).split())}"

    def _correction(self, initializer: Initializer) -> str:
        """Returns what is to be said of a shared initializer; nothing if no section asks for it."""
        if not initializer.paths:
            return ""
        words = "runs on data" if initializer.needs_data() else "runs without data"
        try:
            initializer.check(self._lifecycle.context)
        except DataError as error:
            return f"{words}; the creation will need more: {error}"
        return words

    def _plan(self, algorithm: Algorithm) -> str:
        """Lets an algorithm plan; returns what data has to decide before it can."""
        try:
            self._lifecycle.plan(self._model, algorithm)
        except DecidedFromDataError as error:
            return str(error)
        return ""

    def _observe(self) -> None:
        # An initializer may measure the uncompressed model; `_correction` has said that it needs data.
        with contextlib.suppress(DecidedFromDataError):
            self._lifecycle.observe(self._model)

    def _commit(self, algorithm: Algorithm, undecided: str) -> None:
        """Lets an algorithm commit, and notes what it means for the footprint."""
        if not undecided:
            try:
                self._lifecycle.commit(self._model, algorithm)
            except DecidedFromDataError as error:
                undecided = str(error)
        start, end = self._start, self._end
        remarks: list[str] = []
        if undecided:
            self._start, self._end = start.left_open(undecided), end.left_open(undecided)
            remarks.append(undecided)
        else:
            found = self._effects(algorithm)
            if found is None:
                remarks.append(_SILENT)
            else:
                self._start, self._end = found
        if not algorithm.changes_model:
            remarks = ["changes nothing in the model; it adds a loss to training"]
        if moved := self._moved_by_training(algorithm):
            remarks.append(moved)
        if _estimates_zeros(self._before, end, self._end):
            remarks.append(_SPREAD)
        for footprint in (self._start, self._end):
            remarks += [note for note in footprint.notes if note not in remarks]
            new = {why for figure, why in footprint.open.items() if figure not in end.open}
            remarks += sorted(why for why in new if why not in remarks)
        plan = self._lifecycle.plans.get(algorithm.name, Plan(()))
        targets = [
            PlannedTarget(name, change_in_words(name, start, self._start), change_in_words(name, end, self._end))
            for name in plan.targets
        ]
        entry = PlannedAlgorithm(
            algorithm.name,
            str(self._lifecycle.origins[algorithm.name]),
            algorithm.stage.name.lower(),
            tuple(targets),
            dict(plan.skipped),
            tuple(remarks),
            self._start,
            self._end,
        )
        self._entries.append(entry)
        self._start, self._end = (replace(footprint, notes=(), remarks={}) for footprint in (self._start, self._end))

    def _moved_by_training(self, algorithm: Algorithm) -> str:
        """Returns what is to be said of accuracy-aware training, which changes how a schedule ends."""
        section = self._lifecycle.context.config.root.unread().accuracy_aware_training
        if section is None or not has_settable_rate(algorithm):
            return ""
        if section.mode != ADAPTIVE:
            return "accuracy-aware training may end before the schedule does"
        if section.params.algorithm not in (None, algorithm.name):
            return ""
        return "accuracy-aware training searches the level; the end that is shown is that of the schedule"

    def _effects(self, algorithm: Algorithm) -> tuple[Footprint, Footprint] | None:
        """Returns the footprints after an algorithm, at the start and at the end; None if it says nothing."""
        if not algorithm.changes_model:
            return self._start, self._end
        start = self._lifecycle.effect(self._model, algorithm, self._start, at_end=False)
        end = self._lifecycle.effect(self._model, algorithm, self._end, at_end=True)
        if start is not None and end is not None:
            return start, end
        if not algorithm.replaces_modules:
            return None
        return self._recounted()

    def _recounted(self) -> tuple[Footprint, Footprint]:
        """Counts the model after the commit of an algorithm that has replaced modules."""
        trace, why = self._traced()
        found = Footprint.of_model(self._model, trace)
        if why:
            found = replace(found, open={**self._end.open, "operations": why})
        return found, found


def _estimates_zeros(first: Footprint, before: Footprint, after: Footprint) -> bool:
    """Returns whether an algorithm sets elements to zero of tensors from which an earlier one removes some."""
    return any(
        new.density != before.tensors[name].density and new.shape != first.tensors[name].shape
        for name, new in after.tensors.items()
        if name in before.tensors and name in first.tensors
    )


def change_in_words(name: str, before: Footprint, after: Footprint) -> str:
    """Returns what has happened to a target: the algorithm's own words, or what its parameter shows."""
    if name in after.remarks:
        return after.remarks[name]
    key = after.aliases.get(name, name)
    old, new = before.tensors.get(key), after.tensors.get(key)
    if old is None or new is None:
        return ""
    return ", ".join(_changes(old, new))


def _changes(old: TensorFootprint, new: TensorFootprint) -> list[str]:
    found = []
    if new.shape != old.shape:
        found.append(f"{shape_in_words(old.shape)} to {shape_in_words(new.shape)}")
    if new.density != old.density:
        zeros = f"{1 - new.density:.1%} zeros"
        found.append(f"its part of {zeros} in all" if new.is_average else zeros)
    if new.bits != old.bits:
        found.append(f"{new.bits} bits")
    return found
