"""The base class of algorithms, and `Plan`, what an algorithm is going to change."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from compress_core.config.sections import AlgorithmConfig
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.contract.stages import Stage
from compress_core.contract.statistics import Table
from compress_core.errors import UsageError

if TYPE_CHECKING:
    from compress_core.contract.context import Context

NeedsUncompressed = Literal["no", "creation", "training"]

A = TypeVar("A", bound="Algorithm")
P = ParamSpec("P")
R = TypeVar("R")
# Characters of a value in a table of a notebook.
_LONGEST_SHOWN = 200
# Attribute of methods that are all or nothing.
_MARK = "_compress_all_or_nothing"


@dataclass(frozen=True)
class Plan:
    """What an algorithm is going to change.

    Attributes:
        targets: Dotted names of what will be changed, usually parameters; none for an algorithm that changes nothing.
        skipped: Dotted names of candidates that will not be changed -> the reason.
        details: Anything else that must be the same when a state is resumed; JSON-able.
    """

    targets: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        entries = [f"{len(self.targets)} targets", f"{len(self.skipped)} skipped"]
        return f"Plan({', '.join([*entries, *self.details])})"

    def _repr_html_(self) -> str:
        tables = [Table("Targets", ("name",), [(name,) for name in self.targets])]
        if self.skipped:
            tables.append(Table("Left alone", ("name", "reason"), list(self.skipped.items())))
        if self.details:
            rows = [(name, textwrap.shorten(repr(value), _LONGEST_SHOWN)) for name, value in self.details.items()]
            tables.append(Table("Details", ("name", "value"), rows))
        return "\n".join(table.to_html() for table in tables)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-able dict."""
        return {"targets": list(self.targets), "skipped": dict(self.skipped), "details": dict(self.details)}


def all_or_nothing(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
    """Returns a method of an algorithm that, if it fails or is interrupted, leaves model and controller as before.

    Models and optimizers among its arguments are put back, too. The methods that an algorithm lists in `controller_api`
    are such methods without this. In `compress_step`, which is called before each optimizer step, nothing is saved
    in advance: let it call a method that is marked with this where it changes something.

    Of several processes all have to call it, with the same numbers and words: each waits for the others.
    """
    return _marked(method, local=False)


def for_one_process(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
    """Returns a method as `all_or_nothing` does, which one of several processes may call alone.

    For methods in `controller_api` that change nothing that the others have to have as well, such as measurements.
    """
    return _marked(method, local=True)


def _marked(method: Callable[Concatenate[A, P], R], *, local: bool) -> Callable[Concatenate[A, P], R]:
    @functools.wraps(method)
    def run(self: A, /, *args: P.args, **keywords: P.kwargs) -> R:
        if self._context is None:
            return method(self, *args, **keywords)
        others = [*args, *keywords.values()]
        call = f"{self.name}.{method.__name__}({_described(args, keywords)})"
        transaction = self._context.transaction
        return transaction.run(lambda: method(self, *args, **keywords), others, call=call, local=local)

    run.__dict__[_MARK] = True
    return run


def _described(args: tuple[object, ...], keywords: Mapping[str, object]) -> str:
    """Returns arguments as they are written; numbers and words have to be the same on all processes, data do not."""
    entries = [("", value) for value in args] + [(f"{name}=", value) for name, value in sorted(keywords.items())]
    return ", ".join(
        name + (repr(value) if value is None or isinstance(value, (bool, int, float, str)) else "...")
        for name, value in entries
    )


class Algorithm:
    """Base class of a compression algorithm; one instance serves one model.

    A subclass sets the class attributes and implements hooks of `compress_core.contract.hookspecs` as methods marked
    with `@hookimpl`. `compress_plan` and `compress_commit` are required.

    Attributes:
        name: The name that configs use for it, as the value of `"algorithm"`.
        Config: The class of its config section.
        stage: Its position in the pipeline.
        changes_in_place: Whether commit or calibration write to parameters and buffers, instead of adding transforms.
            Such changes cannot be bypassed, so data-driven initializers need a pass over the model before them.
        changes_model: Whether it changes what the model computes. An algorithm that adds a loss and nothing else
            (distillation, a penalty on weights) sets this to False: it adds no transforms, its plan has no targets, and
            the compression stage is that of the others.
        replaces_modules: Whether commit replaces modules of the model. The algorithm then plans and commits before the
            other algorithms of its stage, which plan on the new modules.
        needs_uncompressed: Whether it needs the model as it was before the first commit (`context.uncompressed()`):
            `"no"`, `"creation"` (while the model is being created), or `"training"` (a frozen teacher that stays, a
            copy of it unless the user has registered another one, see `Context.teacher`).
        needs_batch: Whether its `compress_loss` needs the inputs and outputs of the model's last forward.
        applies_lr_multiplier: Whether its transforms multiply the gradients of their parameters by their attribute
            `lr_multiplier`, which the core sets, and read it in each forward: `scaled_gradient(self.scores,
            self.lr_multiplier)`. If it adds parameters and does not, a config with a multiplier is refused.
        reads_later: Values of the section (dotted, as `params.rate`) that are first read in training, for example in
            `compress_loss`. They are not reported as unused when the model is created.
        controller_api: Names of public methods and attributes that the controller offers as its own. The methods are
            all or nothing, see `all_or_nothing`, and `for_one_process` for those that only measure.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    stage: ClassVar[Stage]
    changes_in_place: ClassVar[bool] = False
    changes_model: ClassVar[bool] = True
    replaces_modules: ClassVar[bool] = False
    needs_uncompressed: ClassVar[NeedsUncompressed] = "no"
    needs_batch: ClassVar[bool] = False
    applies_lr_multiplier: ClassVar[bool] = False
    reads_later: ClassVar[tuple[str, ...]] = ()
    controller_api: ClassVar[tuple[str, ...]] = ()

    _model: nn.Module | None = None
    _context: Context | None = None

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in cls.controller_api:
            method = inspect.getattr_static(cls, name, None)
            if isinstance(method, FunctionType) and _MARK not in method.__dict__:
                setattr(cls, name, all_or_nothing(method))

    def attach(self, context: Context, model: nn.Module | None = None) -> None:
        """Sets the context and the model; the core calls this before `compress_configure` and `compress_plan`."""
        self._context, self._model = context, model

    @property
    def model(self) -> nn.Module:
        """The model that is compressed; available from `compress_plan` on.

        Raises:
            UsageError: `compress_plan` has not been called yet.
        """
        if self._model is None:
            raise UsageError(f"'{self.name}' has no model before compress_plan()")
        return self._model

    @property
    def context(self) -> Context:
        """The context of this model's hooks; available from `compress_configure` on.

        Raises:
            UsageError: `compress_configure` has not been called yet.
        """
        if self._context is None:
            raise UsageError(f"'{self.name}' has no context before compress_configure()")
        return self._context

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes what belongs to this algorithm from a `state_dict` that NNCF saved.

        Called by `compress_core.nncf.load_state` within a transaction; the weights are loaded afterwards.

        Args:
            tensors: The masks, scales and so on in it, of all algorithms.

        Returns:
            Key in the file -> name in the `state_dict` of this model, and the tensor to load there; None if the method
            has set what the tensor says itself. What is not in it counts as not loaded.
        """
        return {}

    @property
    def compression_rate(self) -> float | None:
        """Measured share, 0 to 1, of the weights or channels removed; None if the algorithm removes nothing."""
        return None
