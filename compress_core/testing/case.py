"""What is checked: a model, a config, and how much may differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import nn

from compress_core.api import create_compressed_model, register_default_init_args
from compress_core.config import AlgorithmConfig, CompressionConfig
from compress_core.contract.algorithm import Algorithm
from compress_core.registry import default_registry
from compress_core.session.controller import CompressionController
from compress_core.testing.outputs import scalar


def fail(what: str, remedy: str) -> NoReturn:
    """Raises what a check has found.

    Args:
        what: What is wrong, and where; without a full stop.
        remedy: What to change in the algorithm, a sentence.

    Raises:
        AssertionError: Always.
    """
    raise AssertionError(f"{what}. {remedy}")


def require(fine: bool, what: str, remedy: str) -> None:
    """Calls `fail` unless `fine`."""
    if not fine:
        fail(what, remedy)


@dataclass
class Case:
    """A model and a config to check.

    Attributes:
        make_model: Makes the model; the same weights at each call are not needed.
        inputs: Example arguments of its forward.
        config: The config; its algorithms must not need data unless `loader` gives it.
        loader: Calibration batches; they are registered with `register_default_init_args`, as users do it.
        tolerance: Largest difference that compilation may make, absolute and relative.
        strip_tolerance: The same for `strip`: 0, unless the stripped model sums in another order because its tensors
            are smaller.
        rounding_step: For algorithms that round activations: one step, as a share of the largest value (1/127 for 8
            signed bits). Where another order of sums is unavoidable (Inductor, smaller tensors), a value at the
            boundary between two steps may fall to the neighbour; see `compress_core.testing.outputs.require_close`.
        epochs: How many epochs the model is trained before a check that is about a trained model.
        steps: Optimizer steps of an epoch.
        schedule_epochs: How many epochs schedules are followed without training.
        tags: What cannot be derived from the algorithms' classes: see `compress_core.testing.tags.TAGS`.
        expected_failures: Name of a check -> why the algorithm does not keep that promise. Such a check is skipped with
            the reason when it fails, and fails when it passes.
    """

    make_model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    config: Mapping[str, Any]
    loader: Iterable[Any] | None = None
    tolerance: float = 1e-4
    strip_tolerance: float = 0.0
    rounding_step: float = 0.0
    epochs: int = 2
    steps: int = 2
    schedule_epochs: int = 8
    tags: Iterable[str] = ()
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    _state: dict[str, torch.Tensor] = field(default_factory=dict)
    _shared: tuple[CompressionController, nn.Module] | None = None

    def model(self) -> nn.Module:
        """Returns a model with the weights of this case."""
        model = self.make_model()
        if not self._state:
            self._state = copy.deepcopy(model.state_dict())
        model.load_state_dict(self._state)
        model.zero_grad()
        return model

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the `state_dict` of the plain model."""
        if not self._state:
            self.model()
        return self._state

    def configured(self, loader: Any = None) -> CompressionConfig | Mapping[str, Any]:
        """Returns the config with its data, given in the documented way."""
        data = self.loader if loader is None else loader
        return self.config if data is None else register_default_init_args(self.config, data)

    def compressed(
        self, model: nn.Module | None = None, *, loader: Any = None, observers: Iterable[object] = ()
    ) -> tuple[CompressionController, nn.Module]:
        """Returns a compressed model and its controller.

        Args:
            model: The model to compress; by default a new one.
            loader: Takes the place of the case's loader.
            observers: See `create_compressed_model`.
        """
        model = self.model() if model is None else model
        return create_compressed_model(model, self.configured(loader), observers=observers)

    def resumed(
        self, state: Mapping[str, Any], model: nn.Module | None = None, observers: Iterable[object] = ()
    ) -> tuple[CompressionController, nn.Module]:
        """Returns a model and its controller made from a compression state, without any data."""
        model = self.model() if model is None else model
        teacher = self.model() if any(cls.needs_uncompressed == "training" for cls in self.algorithms()) else None
        return create_compressed_model(model, self.config, state, uncompressed_model=teacher, observers=observers)

    def trained(self, epochs: int | None = None) -> tuple[CompressionController, nn.Module]:
        """Returns a compressed model after a few epochs of training, with its schedule."""
        controller, model = self.compressed()
        train(self, controller, model, epochs)
        return controller, model

    def shared(self) -> tuple[CompressionController, nn.Module]:
        """Returns what `trained` does, the same each time: for checks that only look at it."""
        if self._shared is None:
            self._shared = self.trained()
        return self._shared

    def algorithms(self) -> list[type[Algorithm]]:
        """Returns the classes of the algorithms of the config."""
        sections = CompressionConfig.load(self.config).sections
        names = [section.algorithm for section in sections if isinstance(section, AlgorithmConfig)]
        return [default_registry().algorithm(name).cls for name in names]

    def sections(self) -> list[dict[str, Any]]:
        """Returns a copy of the sections of the config, to be changed.

        Raises:
            SkipTest: The config is no dict.
        """
        if not isinstance(self.config, Mapping):
            raise SkipTest("the config of this case is no dict, so that no section can be added or changed")
        found = copy.deepcopy(self.config["compression"])
        return [dict(found)] if isinstance(found, Mapping) else [dict(section) for section in found]

    def with_sections(self, sections: Sequence[Mapping[str, Any]], loader: Any = None) -> Case:
        """Returns the same case with another config (and loader)."""
        changed = copy.copy(self)
        changed._shared = None
        changed.config = {**self.config, "compression": list(sections)}
        changed.loader = self.loader if loader is None else loader
        return changed


def train(
    case: Case, controller: CompressionController, model: nn.Module, epochs: int | None = None
) -> torch.optim.Optimizer:
    """Trains a compressed model as a user's loop does.

    Args:
        case: Gives inputs and the number of steps.
        controller: Its schedule is followed, its loss added.
        model: Ends in training mode.
        epochs: How many; by default the case's.

    Returns:
        The optimizer.
    """
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for _ in range(case.epochs if epochs is None else epochs):
        controller.scheduler.epoch_step()
        for _ in range(case.steps):
            controller.scheduler.step()
            optimizer.zero_grad()
            loss = scalar(model(*case.inputs)) + controller.loss()
            if loss.requires_grad:
                torch.autograd.backward(loss)
            optimizer.step()
    return optimizer
