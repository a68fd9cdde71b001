"""Gathers what a report shows: measures on a copy of everything, and asks the algorithms."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from compress_core.contract.algorithm import Plan
from compress_core.contract.footprint import Footprint
from compress_core.contract.statistics import Statistics
from compress_core.data.examples import examples_of
from compress_core.errors import CompressionError, PluginError, UsageError
from compress_core.pages import Block
from compress_core.session.batch_recorder import remove_recorders
from compress_core.session.report.measured import Call, Times, largest_difference, times
from compress_core.session.unfinished import unfinished
from compress_core.trace import Example, Trace, trace
from compress_core.trace.graph import ForwardTrace
from compress_core.transforms import activation_transforms
from compress_core.transforms.model_wide import bypass_transforms, transformed_weights
from compress_core.transforms.python_state import PythonState, copied

if TYPE_CHECKING:
    from compress_core.session.controller import CompressionController
    from compress_core.session.lifecycle import Lifecycle
    from compress_core.session.uncompressed import UncompressedModel

logger = logging.getLogger("compress_core.report")


@dataclass(frozen=True)
class ReportOptions:
    """The options of `controller.report`, which explains them."""

    title: str | None = None
    accuracy: Mapping[str, float] | None = None
    evaluate_fn: Callable[[nn.Module], Any] | None = None
    args: Any = None
    latency: bool = True


@dataclass(frozen=True)
class Reported:
    """A compressed model, of which a report is written.

    Attributes:
        controller: Its controller.
        lifecycle: Its algorithms.
        uncompressed: What is known of the model before compression.
    """

    controller: CompressionController
    lifecycle: Lifecycle
    uncompressed: UncompressedModel

    def copy(self) -> Reported:
        """Returns a copy of everything: whatever is done to it, the user's model does not notice."""
        try:
            return copy.deepcopy(self)
        except RuntimeError:  # torch refuses to copy results of a forward that the model has kept, with their graph
            model = self.controller.model
            kept = [*(tensor for _, tensor in PythonState(model).tensors), *model.buffers()]
            return copy.deepcopy(self, {id(t): t.detach().clone() for t in kept if not t.is_leaf})

    def plain(self) -> nn.Module | None:
        """Returns a copy of the model without transforms, in eval mode; None if it is not as large as it was at first.

        Its weights are those that were trained since, so it serves to take the time, not to judge it.
        """
        model = copied(self.controller.model).eval()
        remove_recorders(model)
        for weight in transformed_weights(model):
            weight.remove_transforms()
        for handle in activation_transforms(model):
            handle.remove()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return model if shapes == self.uncompressed.shapes else None


@dataclass
class Material:
    """What a report is made of.

    Attributes:
        accuracy: The accuracy after each step.
        statistics: The statistics by name of the algorithm or initializer.
        measured: What algorithms have measured for this report.
        plans: What each algorithm has changed and skipped.
        forward: A trace of the model without transforms.
        call: Inputs of the model.
        before: Size and operations before compression.
        after: Those of the stripped model.
        file: What a file for a runtime takes, by what the algorithms say; None if that is not known, or the same.
        times: Times of a forward.
        difference: How far the stripped model is from the compressed one.
        remarks: What could not be done, and why.
        unfinished: What the config asks for and the model does not have yet.
    """

    accuracy: dict[str, float]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    measured: Mapping[str, Sequence[Block]] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    forward: ForwardTrace | None = None
    call: Call | None = None
    before: Footprint | None = None
    after: Footprint | None = None
    file: Footprint | None = None
    times: Times | None = None
    difference: float | None = None
    remarks: list[str] = field(default_factory=list)
    unfinished: str = ""


def gather(twin: Reported, accuracy: dict[str, float], options: ReportOptions) -> Material:
    """Returns what a report is made of.

    Args:
        twin: A copy of everything, which is thrown away afterwards.
        accuracy: The accuracy after each step.
        options: The options of the report.
    """
    material = Material(accuracy, plans=twin.lifecycle.plans)
    controller, model = twin.controller, twin.controller.model
    material.unfinished = unfinished(model, twin.lifecycle)
    with _noting(material, "There are no inputs that the model takes, so nothing was run"):
        material.call = _call(twin, options.args)
    plain, traced = twin.plain(), None
    with _noting(material, "The order of the layers could not be traced"), bypass_transforms(model):
        traced = _traced(material, model if plain is None else plain)
        material.forward = None if traced is None else traced.forwards[0]
    with _noting(material, "The model could not be stripped"):
        stripped = controller.strip().eval()
        if plain is None:
            material.remarks.append(
                "There is nothing to compare with: the model as it is has other parameters than before compression."
            )
        else:
            _count(material, twin, _footprint_before(twin, plain, traced), stripped)
        _compare(material, twin, plain, stripped, options)
    # Now, because with strip() filter pruning gets its certificate.
    material.statistics = controller.statistics().parts
    material.measured = twin.lifecycle.report(model)
    return material


@contextlib.contextmanager
def _noting(material: Material, what: str) -> Iterator[None]:
    """Context manager in which an error of the model becomes a sentence of the report; a plugin's own is raised."""
    try:
        yield
    except PluginError:
        raise
    except (CompressionError, RuntimeError, TypeError, ValueError) as error:
        logger.info("%s", what, exc_info=True)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        material.remarks.append(f"{what}: {reason}")


def _call(twin: Reported, args: Any) -> Call:
    model = twin.controller.model
    if args is not None:
        try:
            return Call.of(examples_of(args)[0], model)
        except (LookupError, AttributeError, AssertionError) as error:  # the model's own, of other inputs
            raise UsageError(f"{type(error).__name__}: {error}") from error
    device = next((parameter.device for parameter in model.parameters()), None)
    return Call.of(twin.lifecycle.context.example("report()", device), model)


def _footprint_before(twin: Reported, plain: nn.Module, traced: Trace | None) -> Footprint:
    """Returns the footprint of the model before compression; its zeros are known if a copy of it is kept."""
    kept = twin.uncompressed.kept
    if kept is not None:
        return Footprint.of_model(kept, traced)
    found = Footprint.of_model(plain, traced)
    return found.left_open("the weights before compression are not kept", ["nonzero"])


def _count(material: Material, twin: Reported, before: Footprint, stripped: nn.Module) -> None:
    """Counts parameters, operations and bytes after compression, and what a file with integers takes."""
    with _noting(material, "Parameters and operations could not be counted"):
        material.after = Footprint.of_model(stripped, _traced(material, stripped))
        material.before = before
        file = before
        for algorithm in twin.lifecycle.algorithms:
            file = twin.lifecycle.effect(twin.controller.model, algorithm, file, at_end=False) or file
        has_integers = any(
            tensor.stored_bits < before.tensor(name).stored_bits for name, tensor in file.tensors.items()
        )
        # Otherwise an algorithm has said nothing of what it does to shapes.
        if has_integers and "size" not in file.open and file.parameters == material.after.parameters:
            material.file = file


def _traced(material: Material, model: nn.Module) -> Trace | None:
    call = material.call
    return None if call is None else trace(model, Example.of(*call.args, **call.kwargs))


def _compare(
    material: Material, twin: Reported, plain: nn.Module | None, stripped: nn.Module, options: ReportOptions
) -> None:
    """Compares the stripped model with the compressed one, and its time with that of the model before compression."""
    call = material.call
    if call is None:
        return
    with _noting(material, "The stripped model could not be compared with the compressed one"):
        material.difference = largest_difference(twin.controller.model, stripped, call)
    if not options.latency:
        return
    with _noting(material, "The time of a forward could not be measured"):
        models = {"stripped": stripped} if plain is None else {"before": plain, "stripped": stripped}
        material.times = times(models, call)
