"""What can be observed of a compressed model: everything that a value of the config could have changed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from compress_core import (
    CompressionConfig,
    CompressionError,
    LeGRInitArgs,
    create_accuracy_aware_training_loop,
    create_compressed_model,
)
from compress_core.config.errors import shown
from compress_core.data.structures import tensors_of
from compress_core.transforms.chain import TransformChain

EPOCHS, STEPS = 6, 2

# What a model says of itself. A setting that is merely repeated here has had no effect.
TOLD = ("plan", "modules", "statistics")


class Net(nn.Module):
    """Three convolutions with batch norm, a residual add, a concat, a linear layer: 8x8 images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(width) for _ in range(3))
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn0(self.conv0(x)).relu()
        x = x + self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(x)).relu()
        return self.fc(torch.cat([y, F.max_pool2d(x, 2)], 1).mean((2, 3)))


class Wide(Net):
    """A model whose multiplications take most of its time."""

    def __init__(self) -> None:
        super().__init__(192)


class Normalized(Net):
    """A model with a normalization of its outputs, whose input some devices quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, x):
        return self.norm(super().forward(x))


class Linears(nn.Module):
    """Two linear layers on the mean of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.mean((2, 3))).relu())


class Routed(nn.Module):
    """A model whose way depends on everything that `input_info` says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        for name in ("large", "integer", "left", "right", "positive", "constant"):
            self.add_module(name, nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x, left=None, right=None):
        image = x.float()
        ways = {
            "large": x.shape[-1] > 8,
            "integer": not x.is_floating_point(),
            "left": left is not None,
            "right": right is not None,
            "positive": bool((image > 0).any()),
            "constant": bool((image == image.flatten()[0]).all()),
        }
        y = self.stem(image)
        for name, taken in ways.items():
            if taken:
                y = self._modules[name](y).relu()
        return self.fc(y.mean((2, 3)))


class Several(nn.Module):
    """A model with a layer that returns two tensors, and which returns both in training and one in eval mode."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.left(x), self.right(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Several.Two()

    def forward(self, x):
        first, second = self.two(self.norm(self.conv(x)))
        return {"first": first, "second": second} if self.training else first * 2 + 1


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Batches of different spread, so that a mean over batches is not the whole; outliers, so that percentiles matter.
    return [
        torch.randn(4, 3, 8, 8, generator=generator) * (1 + i) + 0.5 * torch.rand(1, generator=generator)
        for i in range(count)
    ]


def make_model(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    if kind is Net:
        with torch.no_grad():
            model.conv0.weight[:4] *= 3  # channels and layers of different size
            model.conv2.weight *= 0.5
            for batch in batches(3):
                model(batch)
    return model


@dataclass(frozen=True)
class Observation:
    """What came of a document.

    Attributes:
        aspects: Name -> what was seen, comparable; empty when the document was refused.
        warnings: What was logged as a warning.
        error: What was raised.
    """

    aspects: dict[str, Any]
    warnings: tuple[str, ...] = ()
    error: CompressionError | None = None

    def differences(self, other: Observation) -> set[str]:
        return {name for name in self.aspects.keys() | other.aspects.keys() if self._of(name) != other._of(name)}

    def _of(self, name: str) -> Any:
        return self.aspects.get(name)


_observed: dict[str, Observation] = {}


def observed(document: dict[str, Any], *, kind: type[nn.Module] = Net, data: bool = True) -> Observation:
    """Does what `observe` does, once for each document."""
    key = f"{json.dumps(document, default=repr)} {kind.__name__} {data}"
    if key not in _observed:
        _observed[key] = observe(document, kind=kind, data=data)
    return _observed[key]


def with_functions(document: dict[str, Any]) -> Any:
    """Registers the functions that a search of a ranking needs, if the document has settings of one."""
    if "legr_params" not in json.dumps(document, default=repr):
        return document

    def train(loader: Any, model: nn.Module, optimizer: torch.optim.Optimizer, controller: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(loader[0]).square().mean().backward()
            optimizer.step()

    def validate(model: nn.Module, loader: Any) -> tuple[float, float]:
        return 0.0, float(model(loader[0]).square().mean())

    functions = LeGRInitArgs(batches(), train, None, batches(), validate)
    return CompressionConfig.load(document).register_extra_structs([functions])


def observe(document: dict[str, Any], *, kind: type[nn.Module] = Net, data: bool = True) -> Observation:
    """Creates the compressed model, trains nothing, and looks at it from all sides."""
    model = make_model(kind)
    with _warnings() as warnings:
        try:
            config = with_functions(document)
            controller, model = create_compressed_model(model, config, init_loader=batches() if data else None)
        except CompressionError as error:
            return Observation({}, tuple(warnings), error)
        state = controller.get_compression_state()
        statistics = {name: part for name, part in controller.statistics().to_dict().items() if name != "ledger"}
        aspects = {
            "plan": {name: entry["plan"] for name, entry in state["algorithms"].items()},
            "state": {name: entry["state"] for name, entry in state["algorithms"].items()},
            "modules": _modules(model),
            "statistics": _without_times(statistics),
            "tensors": _tensors(model),
            "outputs": _outputs(model),
            **_backward(model),
            "losses": list(_losses(controller, model)),
            "schedule": list(_schedule(controller, model)),
        }
        if "accuracy_aware_training" in document:
            aspects["accuracy-aware training"] = _accuracy_aware(document, kind)
    return Observation(aspects, tuple(warnings))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != "seconds"}
    return [_without_times(item) for item in value] if isinstance(value, (list, tuple)) else value


def _modules(model: nn.Module) -> dict[str, Any]:
    simple = (bool, int, float, str, tuple)
    return {
        name: (type(module).__name__, {k: v for k, v in module.__dict__.items() if isinstance(v, simple)})
        for name, module in model.named_modules()
    }


def _tensors(model: nn.Module) -> dict[str, str]:
    return {name: _bits(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _bits(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "none"
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def _outputs(model: nn.Module) -> str:
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return _bits(model.eval()(batches(1)[0]))
    finally:
        for module, mode in training.items():
            module.training = mode


def _backward(model: nn.Module) -> dict[str, Any]:
    """The gradients, and how many weights are computed again for them."""
    model = copy.deepcopy(model)
    outputs = list(tensors_of(model(batches(1)[0])))
    with mock.patch.object(TransformChain, "forward", autospec=True, side_effect=TransformChain.forward) as again:
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
    gradients = {name: _bits(parameter.grad) for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "weights computed again": again.call_count}


def _losses(controller: Any, model: nn.Module) -> Iterator[Any]:
    """What algorithms add to the loss, along the schedule."""
    if not any(hasattr(algorithm, "compress_loss") for algorithm in controller.algorithms.values()):
        return
    controller, model = copy.deepcopy((controller, model))
    for _ in range(EPOCHS):
        controller.scheduler.epoch_step()
        model.train()(batches(1)[0])
        try:
            yield shown(controller.loss().item())
        except CompressionError as error:
            yield str(error)


def _loss_of(controller: Any) -> Any:
    try:
        return _bits(controller.loss())
    except CompressionError as error:  # it needs a forward in training mode: see `_losses`
        return str(error)


def _schedule(controller: Any, model: nn.Module) -> Iterator[Any]:
    for _ in range(EPOCHS):
        for tick in (controller.scheduler.epoch_step, *[controller.scheduler.step] * STEPS):
            tick()
            stage = controller.compression_stage().name
            loss = _loss_of(controller)
            yield shown(controller.compression_rate), stage, loss, _tensors(model), _outputs(model)


def _accuracy_aware(document: dict[str, Any], kind: type[nn.Module]) -> list[Any]:
    """What the loop does with a metric that falls with the rate and rises with each epoch."""
    controller, model = create_compressed_model(make_model(kind), document, init_loader=batches())
    loop = create_accuracy_aware_training_loop(document, controller, 0.6, verbose=False)

    def optimizers() -> Any:
        return torch.optim.SGD(model.parameters(), 0.01), None

    def validate(model: nn.Module, epoch: int) -> float:
        return 1 - 1.2 * controller.compression_rate + 0.01 * epoch

    with tempfile.TemporaryDirectory() as folder, mock.patch("compress_core.accuracy_aware.base.draw_accuracy_aware"):
        loop.run(model, lambda *args, **keywords: controller.scheduler.step(), validate, optimizers, log_dir=folder)
    return [record.model_dump() for record in loop.statistics.epochs]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("compress_core", *_PLUGINS)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


_PLUGINS = (
    "compress_filter_pruning",
    "compress_knowledge_distillation",
    "compress_learned_sparsity",
    "compress_magnitude_sparsity",
    "compress_quantization",
    "compress_weight_reconstruction",
)
