"""What becomes of one model under one algorithm, stage by stage, and what is said where it fails."""

from __future__ import annotations

import copy
import io
import json
import logging
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.zoo.entries import Case, Entry, tensors
from compress_core import (
    CompressionConfig,
    CompressionController,
    CompressionError,
    InitArgs,
    PluginError,
    StateError,
    create_compressed_model,
    fold_computed_weights,
    register_default_init_args,
)

STAGES = ("created", "steps", "statistics", "strip", "resumed", "exported")
# Stripped and resumed models compute the same; torch's operators and ours may round differently in the last bits.
_TOLERANCE = 1e-3

_SECTIONS: dict[str, dict[str, Any]] = {
    "filter_pruning": {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 2}},
    "magnitude_sparsity": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
    "quantization": {"algorithm": "quantization"},
}
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "quantization": ("quantization",),
    "magnitude_sparsity": ("magnitude_sparsity",),
    "filter_pruning": ("filter_pruning",),
    "all three": tuple(_SECTIONS),
}


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        status: `ok`; `help`: ok once the user does what the error says: register a `forward_fn`, fold computed weights;
            `sentence`: one of our own
            errors; `defect`: anything else; `skipped`: not tried, and `message` says why.
        message: What was said or found.
        figures: Measured numbers by name.
    """

    status: str
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


class WrongResultError(Exception):
    """A wrong result that nobody has said a word about."""


def measure(entry: Entry, algorithm: str, plain: Mapping[str, Any], export: bool) -> Iterator[tuple[str, Outcome]]:
    """Yields the stages of one model under one algorithm; each is worth having, should the process die in the next."""
    trial = _Trial(entry, ALGORITHMS[algorithm], plain)
    for stage, run in (
        ("created", trial.create),
        ("steps", trial.train),
        ("statistics", trial.check_statistics),
        ("strip", trial.strip),
        ("resumed", trial.resume),
        ("exported", trial.export),
    ):
        if stage == "exported" and (not export or not plain.get("exports")):
            why = f"the plain model does not export: {plain.get('export_error', '')}" if export else "not asked for"
            yield stage, Outcome("skipped", why)
            continue
        outcome = attempted(run)
        yield stage, outcome
        if stage == "created" and outcome.status not in {"ok", "help"}:
            return


def measure_plain(entry: Entry, export: bool) -> dict[str, Any]:
    """Returns what the plain model can do: seconds of a step, which parameters get gradients, whether it exports."""
    case = fresh(entry)
    case.model.train()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3)
    seconds = []
    for number in range(4):
        started = time.process_time()
        optimizer.zero_grad()
        case.loss(case.model, case.batches[number % 2]).backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    found: dict[str, Any] = {
        "step_seconds": statistics.median(seconds[1:]),
        "gradients": [name for name, parameter in case.model.named_parameters() if parameter.grad is not None],
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
    }
    if not _finite(evaluated(case.model, case)):
        found["not_finite"] = True
    if export:
        outcome = attempted(lambda: _export_plain(fresh(entry)))
        found |= {"exports": outcome.status == "ok", "export_error": outcome.message[:200]}
    return found


class _Trial:
    """One model under one algorithm."""

    def __init__(self, entry: Entry, names: tuple[str, ...], plain: Mapping[str, Any]) -> None:
        self._entry, self._names, self._plain = entry, names, plain
        self._case = fresh(entry)
        self._helped = self._folded = False
        self._said: list[str] = []
        self._controller: CompressionController
        self._weights = _weights(self._case.model, plain)

    def create(self) -> Outcome:
        before = evaluated(self._case.model, self._case)
        with _logged(self._said):
            try:
                seconds = self._create()
            except CompressionError as error:
                message = _described(error)
                if "fold_computed_weights" in message:
                    self._folded = True
                    fold_computed_weights(self._case.model)
                elif "forward_fn" in message:
                    self._helped = True
                else:
                    raise
                seconds = self._create()
        after = evaluated(self._case.model, self._case)
        if _finite(before) and not _finite(after):
            raise WrongResultError("the outputs are not finite any more")
        figures = {
            "creation_steps": seconds / self._plain["step_seconds"],
            "seconds": seconds,
            "error": _difference(before, after),
            "said": self._said[:5],
        }
        return Outcome("help", message, figures) if self._helped or self._folded else Outcome("ok", "", figures)

    def _create(self) -> float:
        started = time.process_time()
        self._controller, _ = create_compressed_model(self._case.model, self._config(self._case))
        return time.process_time() - started

    def _config(self, case: Case) -> CompressionConfig:
        """Returns the config as a user writes it."""
        sections = [copy.deepcopy(_SECTIONS[name]) for name in self._names]
        if any(isinstance(module, _BatchNorm) for module in case.model.modules()):
            for section in sections:
                section["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 4}}
        loader = case.batches
        document = {"compression": sections if len(sections) > 1 else sections[0]}
        if not self._helped:
            return register_default_init_args(document, loader)
        config = CompressionConfig.load(document)
        config.register_extra_structs([InitArgs(loader, forward_fn=case.help)])
        return config

    def train(self) -> Outcome:
        model, case = self._case.model, self._case
        model.train()
        kind = torch.optim.SGD if self._entry.kind in {"image classifiers", "segmentation"} else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=1e-3)
        self._controller.scheduler.epoch_step()
        reached: set[str] = set()
        for batch in case.batches[:2]:
            self._controller.scheduler.step()
            optimizer.zero_grad()
            loss = case.loss(model, batch) + self._controller.loss()
            loss.backward()
            if not torch.isfinite(loss).all():
                raise WrongResultError(f"the loss is {loss.item()}")
            bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            if bad:
                raise WrongResultError(f"gradients that are not finite: {_some(bad)}")
            reached |= {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            optimizer.step()
        present = {name for name, _ in model.named_parameters()}  # folded weights have other names
        lost = [name for name in self._plain["gradients"] if name in present and name not in reached]
        if lost:
            raise WrongResultError(f"no gradient for {_some(lost)}; the plain model has one")
        self._check_quantizers(reached)
        return Outcome("ok")

    def _check_quantizers(self, reached: set[str]) -> None:
        """Raises if quantizers of activations act in eval mode only, and nobody has said so."""
        if "quantization" not in self._names:
            return
        owners = {id(p): name for name, p in self._case.model.named_parameters()}
        quantizers = {
            name: [owners[id(p)] for p in module.parameters() if p.requires_grad and id(p) in owners]
            for name, module in self._controller.non_weight_quantizers.items()
            if module.enabled
        }
        idle = [name for name, owned in quantizers.items() if owned and not reached & set(owned)]
        silent = [name for name in idle if not any(name in said or "training" in said for said in self._said)]
        if silent:
            raise WrongResultError(
                f"{len(idle)} of {len(quantizers)} quantizers of activations idle in training: {_some(silent)}"
            )

    def check_statistics(self) -> Outcome:
        found = self._controller.statistics()
        found.to_str()
        text = json.dumps(found.to_dict(), allow_nan=False)
        named = {string.partition("|")[0] for string in _strings(json.loads(text))}
        left_out = [
            name
            for name, aliases in self._weights.items()
            if not any(alias in named or alias.rpartition(".")[0] in named for alias in aliases)
        ]
        if left_out:
            raise WrongResultError(
                f"{len(left_out)} of {len(self._weights)} weights are not in the statistics: {_some(left_out)}"
            )
        return Outcome("ok")

    def strip(self) -> Outcome:
        expected = evaluated(self._case.model, self._case)
        stripped = self._controller.strip()
        difference = _difference(expected, evaluated(stripped, self._case))
        if difference <= _TOLERANCE:
            return Outcome("ok", figures={"difference": difference})
        sensitivity = _sensitivity(self._case, expected)
        if difference > 3 * sensitivity:
            raise WrongResultError(f"the stripped model differs by {difference:.1%}")
        return Outcome("ok", figures={"difference": difference, "sensitivity": sensitivity})

    def resume(self) -> Outcome:
        expected = evaluated(self._case.model, self._case)
        state = json.loads(json.dumps(self._controller.get_compression_state()))
        buffer = io.BytesIO()
        torch.save(self._case.model.state_dict(), buffer)
        buffer.seek(0)
        case = fresh(self._entry)
        if self._folded:
            fold_computed_weights(case.model)
        create_compressed_model(case.model, self._config(case), compression_state=state)
        case.model.load_state_dict(torch.load(buffer, weights_only=True))
        difference = _difference(expected, evaluated(case.model, self._case))
        if difference > _TOLERANCE:
            raise WrongResultError(f"the resumed model differs by {difference:.1%}")
        return Outcome("ok", figures={"difference": difference})

    def export(self) -> Outcome:
        self._case.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            report = self._controller.export_onnx(Path(folder) / "model.onnx")
        return Outcome("ok", figures={"seconds": time.process_time() - started, "report": report.to_str()[:200]})


def fresh(entry: Entry) -> Case:
    """Returns the model anew, always with the same weights and batches."""
    torch.manual_seed(0)
    return entry.make()


def evaluated(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """Returns the outputs in eval mode on the first batch."""
    torch.manual_seed(0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [tensor.detach().clone() for tensor in tensors(case.outputs(model, copy.deepcopy(case.batches[0])))]
    finally:
        model.train(training)


def attempted(run: Callable[[], Outcome]) -> Outcome:
    """Returns how a stage ended, whatever it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except WrongResultError as error:
        return Outcome("defect", str(error))
    except (PluginError, StateError) as error:  # the plugin and the state are ours: nobody else can be blamed
        return Outcome("defect", _described(error))
    except CompressionError as error:
        return Outcome("sentence", _described(error))
    except Exception as error:
        return Outcome("defect", f"{_described(error)} {_where(error)}")


def _described(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:900]


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "compress_" in f.filename] or frames
    places = dict.fromkeys(f"[{Path(f.filename).name}:{f.lineno}]" for f in (ours[-1], frames[-1]))
    return "".join(places)


def _weights(model: nn.Module, plain: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the weights that are trained and have two dimensions or more -> their names, if several share them.

    A scale of each channel, shaped (1, 1, 1, channels), has one.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: names[id(parameter)]
        for name, parameter in model.named_parameters()
        if sum(size > 1 for size in parameter.shape) >= 2 and name.endswith("weight") and name in plain["gradients"]
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Returns the largest mean absolute difference of an output, relative to its mean magnitude; 0 for no outputs."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    worst = [float((a - b).nan_to_num().abs().mean() / a.nan_to_num().abs().mean().clamp_min(1e-12)) for a, b in pairs]
    return max(worst, default=0.0)


def _sensitivity(case: Case, expected: list[torch.Tensor]) -> float:
    """Returns how much the outputs change if every parameter changes in its last bits.

    A value that lies between two steps of a grid may be rounded to either, and networks with random weights amplify
    that: two correct implementations then differ by as much.
    """
    found = []
    for seed in range(4):
        model, generator = copy.deepcopy(case.model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
        found.append(_difference(expected, evaluated(model, case)))
    return max(found)


def _finite(outputs: list[torch.Tensor]) -> bool:
    return not any(tensor.isnan().any() for tensor in outputs)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


class _logged:  # noqa: N801 - used as a function
    """Collects what is logged while it is entered."""

    def __init__(self, said: list[str]) -> None:
        self._listener = _Listener(said)

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self._listener)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._listener)


def _export_plain(case: Case) -> Outcome:
    """Exports the plain model with the arguments that its users call it with."""
    import onnxruntime  # noqa: PLC0415 - an extra

    seen: list[Any] = []
    model = case.model.eval()
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        case.outputs(model, copy.deepcopy(case.batches[0]))
        handle.remove()
        args, kwargs = seen[0]
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "plain.onnx")
            torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, verbose=False)
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Outcome("ok")
