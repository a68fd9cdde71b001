"""Runs every document of NNCF in a folder: created, trained two steps, resumed, stripped, or what refuses it.

Models are torchvision's where it has them, transformers' BERT, and small networks of the same names
(`benchmarks.nncf_networks`). Data are random. Sizes of pictures and numbers of samples, of searches and of epochs are
made small; all else is as the document says. An accuracy-aware document is trained by its loop instead of two steps.

"resumed" means: a new model with the saved state gives the same outputs to the last bit, in both modes. "stripped": the
plain model gives what the compressed one gives in eval mode, within 1e-4; with quantization, a value at the boundary of
two steps may fall to the neighbour in torch's own operators, as the conformance kit allows.

Usage: python -m benchmarks.nncf_documents DIRECTORY [--only TEXT] [--keep] [--name nncf_documents]
Needs torchvision and transformers. Prints a table, and writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.nncf_networks import SSD, ICNet, RMNetClassifierCifar, UNet
from benchmarks.torchvision_operators import define_missing_operators
from compress_core.contract.statistics import Table
from compress_core.errors import CompressionError, UsageError
from compress_core.nncf import (
    NNCFConfig,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.testing.outputs import require_close

STEP = 1 / 127
# Name of a number in a document -> the largest that is used here.
SMALLER = {
    "num_init_samples": 4,
    "num_bn_adaptation_samples": 4,
    "num_data_points": 4,
    "iter_number": 2,
    "generations": 3,
    "maximal_total_epochs": 3,
    "initial_training_phase_epochs": 1,
    "patience_epochs": 1,
}
_CLASSES, _BATCH, _STEPS = 5, 2, 2
_OWN = {
    "RMNetClassifierCifar": RMNetClassifierCifar,
    "unet": UNet,
    "icnet": ICNet,
    "ssd_vgg": SSD,
    "ssd_mobilenet": SSD,
}
# Names of models in NNCF's examples -> those of torchvision.
_SAME = {"mobilenet_v2_tv_092": "mobilenet_v2", "ResNet34_cifar": "resnet34", "incept_v3_cifar100": "inception_v3"}
_WITHOUT_AUX = ("inception_v3", "googlenet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="a text that names of documents must have")
    parser.add_argument("--name", default="nncf_documents", help="of the file of results")
    parser.add_argument("--keep", action="store_true", help="do not run again what the file of results has")
    options = parser.parse_args()
    results = report.RESULTS / f"{options.name}.json"
    rows = json.loads(results.read_text())["documents"] if options.keep and results.exists() else []
    for path in sorted(options.directory.glob("**/*.json")):
        name = path.relative_to(options.directory).with_suffix("").as_posix()
        if options.only in name and name not in {row["document"] for row in rows}:
            rows.append(run(path, name))
            rows.sort(key=lambda row: row["document"])
            print(name, flush=True)
            report.write(options.name, {"documents": rows})
    report.show(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns what happened to each document, and how many got how far."""
    parts = ("created", "trained", "resumed", "stripped")
    cells: list[tuple[str, ...]] = [
        (row["document"], row["model"], *("yes" if row[part] else "-" for part in parts), row["sentence"][:90])
        for row in rows
    ]
    sums = (str(sum(bool(row[part]) for row in rows)) for part in parts)
    cells.append((f"{len(rows)} documents", "", *sums, ""))
    return Table("Documents of NNCF", ("document", "model", *parts, "the sentence that refuses it"), cells)


def run(path: Path, name: str) -> dict[str, Any]:
    """Runs one document; returns what happened, without the path."""
    row: dict[str, Any] = {"document": name, "model": "", "algorithms": "", "sentence": ""}
    row |= dict.fromkeys(("created", "trained", "resumed", "stripped"), False)
    try:
        document = Document(path)
        row |= {"model": document.name, "algorithms": " + ".join(document.algorithms)}
        for part in document.parts():
            row[part] = True
    except CompressionError as error:
        row["sentence"] = str(error).replace(str(path), name)
    except Exception as error:  # what is no CompressionError is a defect, and shall be seen beside the others
        row["sentence"] = f"{type(error).__name__}: {error}".replace(str(path), name)
    return row


class Document:
    """One document, with its model and data."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.config = NNCFConfig.from_json(str(path))
        smaller(self.config)
        sections = self.config.get("compression", [])
        sections = [sections] if isinstance(sections, Mapping) else sections
        self.algorithms = [section["algorithm"] for section in sections]
        for section in sections:
            if section.get("initializer", {}).get("precision", {}).get("type") == "hawq":
                section["initializer"]["precision"].setdefault("iter_number", SMALLER["iter_number"])
        legr = [params for s in sections for key, params in s.get("params", {}).items() if key == "legr_params"]
        for params in legr:
            params |= {"train_steps": 1, "population_size": 2, "num_samples": 2}
        self.name = str(self.config.get("model", "BERT" if "movement_sparsity" in self.algorithms else ""))
        self.make, side = model_of(self.name)
        shape = [_BATCH, 3, side, side]
        if self.name == "BERT":
            self.config["input_info"] = [{"sample_size": [_BATCH, 16], "type": "long"}] * 4
        else:
            self.config["input_info"] = {"sample_size": shape}
        self.data = [self.batch(shape) for _ in range(2)]

    def batch(self, shape: list[int]) -> tuple[Any, torch.Tensor]:
        """Returns a random batch and labels."""
        labels = torch.randint(0, _CLASSES, (_BATCH,))
        if self.name != "BERT":
            return torch.randn(shape), labels
        words, kinds = torch.randint(0, 50, (_BATCH, 16)), torch.zeros(_BATCH, 16, dtype=torch.long)
        return {"input_ids": words, "attention_mask": kinds + 1, "token_type_ids": kinds}, labels

    def parts(self) -> Iterator[str]:
        """Does what the document says; yields the name of each part that is done."""
        uncompressed = self.model()
        model = copy.deepcopy(uncompressed)
        config = self.registered()
        controller, model = create_compressed_model(model, config)
        yield "created"
        if "accuracy_aware_training" in config:
            model = self.loop(config, controller, model)
        else:
            controller.scheduler.epoch_step()
            self.train(controller, model)
        if not all(torch.isfinite(tensor).all() for tensor in self.outputs(model)):
            raise AssertionError("the trained model gives values that are not finite")
        yield "trained"
        state = json.loads(json.dumps(controller.get_compression_state()))
        # Only distillation asks for it; given to others, it is not used.
        teacher = copy.deepcopy(uncompressed) if "knowledge_distillation" in self.algorithms else None
        again, twin = create_compressed_model(uncompressed, self.registered(), state, uncompressed_model=teacher)
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
        for training in (False, True):
            if not all(
                torch.equal(*pair)
                for pair in zip(self.outputs(model, training), self.outputs(twin, training), strict=True)
            ):
                raise AssertionError(f"the resumed model gives other outputs with train({training})")
        if json.loads(json.dumps(again.get_compression_state())) != state:
            raise AssertionError("the resumed state is another")
        yield "resumed"
        step = STEP if "quantization" in self.algorithms else 0.0
        expected, found = self.outputs(model), self.outputs(controller.strip())
        require_close(found, expected, 1e-4, "the stripped model", "", rounding_step=step)
        yield "stripped"

    def model(self) -> nn.Module:
        """Returns the model, with half of its weights zero where the document is for a sparse one."""
        model = self.make()
        if "const_sparsity" in self.algorithms:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1 and parameter[0].numel() > 9:  # none is left of small ones
                        parameter.mul_(torch.rand_like(parameter) < 0.5)
        return model

    def registered(self) -> NNCFConfig:
        """Returns the config with data and functions."""
        return register_default_init_args(
            copy.deepcopy(self.config),
            self.data,
            criterion=nn.CrossEntropyLoss(),
            criterion_fn=lambda outputs, target, criterion: loss_of(outputs, target),
            train_steps_fn=self.train_steps,
            validate_fn=lambda model, loader: (self.metric(model), 1.0),
            val_loader=self.data,
            autoq_eval_fn=lambda model, loader: self.metric(model),
            model_eval_fn=lambda model, loader: self.metric(model),
        )

    def train(self, controller: Any, model: nn.Module, steps: int = _STEPS) -> None:
        """Trains some steps."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model.train()
        for number in range(steps):
            controller.scheduler.step()
            x, y = self.data[number % len(self.data)]
            loss = loss_of(forward(model, x), y) + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            if not torch.isfinite(loss):
                raise AssertionError(f"the loss is {loss.item()}")
            # A batch norm over two values, as in the last layers here, gives gradients of any size.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()

    def train_steps(self, loader: Any, model: nn.Module, optimizer: Any, pruner: Any, steps: int) -> None:
        """Trains as `learned_ranking` asks."""
        for x, y in list(loader)[:steps]:
            optimizer.zero_grad()
            (loss_of(forward(model, x), y) + pruner.loss()).backward()
            optimizer.step()

    def loop(self, config: NNCFConfig, controller: Any, model: nn.Module) -> nn.Module:
        """Trains by the accuracy-aware loop."""

        def train_epoch(ctrl: Any, model: nn.Module, **more: Any) -> None:
            self.train(ctrl, model, steps=1)

        loop = create_accuracy_aware_training_loop(config, controller, self.metric(model))
        with tempfile.TemporaryDirectory() as folder:
            return loop.run(
                model,
                train_epoch_fn=train_epoch,
                validate_fn=lambda model, epoch=None: self.metric(model),
                configure_optimizers_fn=lambda: (torch.optim.SGD(model.parameters(), lr=1e-2), None),
                log_dir=folder,
            )

    def metric(self, model: nn.Module) -> float:
        """Returns something that is higher for lower losses."""
        training = model.training
        model.eval()
        with torch.no_grad():
            loss = sum(float(loss_of(forward(model, x), y)) for x, y in self.data)
        model.train(training)
        return 100.0 / (1.0 + loss)

    def outputs(self, model: nn.Module, training: bool = False) -> list[torch.Tensor]:
        """Returns the tensors that the model gives; the same noise is drawn each time."""
        torch.manual_seed(1)
        model.train(training)
        with torch.no_grad():
            return tensors(forward(model, self.data[0][0]))


def model_of(name: str) -> tuple[Callable[[], nn.Module], int]:
    """Returns what makes the model of a document, and the side of its pictures."""
    if name in _OWN:
        return lambda: _OWN[name](_CLASSES), 32
    if name == "BERT":
        return bert, 0
    define_missing_operators()
    models = importlib.import_module("torchvision.models")
    if name == "mobilenet_v2_32x32":
        return lambda: type("MobileNetV2For32x32", (models.MobileNetV2,), {})(num_classes=_CLASSES), 32
    name = _SAME.get(name, name)
    if name not in models.list_models():
        raise UsageError(f"'{name}' is no model of torchvision or of benchmarks.nncf_networks; add one to _OWN")
    more = {"aux_logits": False, "init_weights": False} if name in _WITHOUT_AUX else {}
    if name == "inception_v3":
        more["transform_input"] = True  # as torchvision does with pretrained weights; documents name these calls
    # Small enough to be quick, and so large that a batch norm has several values of each channel.
    side = 96 if more else 64 if name.startswith("mobilenet") else 32
    return lambda: models.get_model(name, weights=None, num_classes=_CLASSES, **more), side


def bert() -> nn.Module:
    """Returns a BERT of two layers, with the heads of 64 channels that the document is for."""
    define_missing_operators()
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=16,
        num_labels=_CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def smaller(values: Any) -> None:
    """Makes the numbers of `SMALLER` small, wherever they are."""
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if key in SMALLER:
            values[key] = min(value, SMALLER[key])
        elif isinstance(value, Mapping | list):
            smaller(value)


def forward(model: nn.Module, x: Any) -> Any:
    """Calls the model with a batch."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def tensors(outputs: Any) -> list[torch.Tensor]:
    """Returns the tensors of what a model gives."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in tensors(value)]


def loss_of(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross entropy of scores of classes, or the mean square of other outputs."""
    found = tensors(outputs)
    if len(found) == 1 and found[0].ndim == 2 and len(found[0]) == len(labels):
        return nn.functional.cross_entropy(found[0], labels)
    return torch.stack([tensor.square().mean() for tensor in found]).sum()


if __name__ == "__main__":
    main()
