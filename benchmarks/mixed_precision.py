"""Is a choice of bits by `sensitivity` ahead of uniform bits, of `hawq` and of random choices of the same size?

Usage: python -m benchmarks.mixed_precision [--networks resnet56 vgg16-bn fashion-resnet] [--keep] [--test-images 10000]

Trained networks, not trained further: ranges from 128 training images, batch-norm adaptation on 256, weights with an
average of 4 or 6 bits, activations with 8. `hawq` gets the same budget, numbers of bits 2, 4, 6, 8 (more make too many
assignments to compare) and no labels; `sensitivity, 2 4 6 8` chooses from the same ones. Random choices are drawn
until their average is at most the budget and less than 0.05 below it. Reported on the first test images: accuracy, how
often the class is that of the network in FP32, and the mean divergence (KL) of the softmax from that of FP32, in which
differences show that accuracy on so few images does not. Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from benchmarks.bn_adaptation import NETWORKS
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import Dataset, cifar10, fashion_mnist

DATA = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}
NAMES = ("fashion-resnet", "vgg16-bn", "resnet56")
BITS = [2, 3, 4, 5, 6, 7, 8]
OF_HAWQ = [2, 4, 6, 8]
BATCH = 100


def document(precision: dict[str, Any] | None, weight_bits: int | None = None) -> dict[str, Any]:
    """Returns the config."""
    initializer: dict[str, Any] = {
        "range": {"num_init_samples": 128},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 256},
    }
    if precision is not None:
        initializer["precision"] = precision
    section: dict[str, Any] = {"algorithm": "quantization", "activations": {"bits": 8}, "initializer": initializer}
    if weight_bits is not None:
        section["weights"] = {"bits": weight_bits}
    return {"target_device": "TRIAL", "compression": section}


def outputs_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns the outputs of a model in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(BATCH)])


def compared(outputs: torch.Tensor, plain: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Returns the figures of outputs beside those of the network in FP32."""
    log_p, log_q = F.log_softmax(plain.double(), 1), F.log_softmax(outputs.double(), 1)
    return {
        "accuracy": 100 * (outputs.argmax(1) == labels).double().mean().item(),
        "agreement": 100 * (outputs.argmax(1) == plain.argmax(1)).double().mean().item(),
        "divergence": F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item(),
    }


def average_bits(controller: Any, sizes: dict[str, int]) -> float:
    """Returns the mean number of bits of the elements of quantized weights."""
    bits = {name: quantizer.bits for name, quantizer in controller.weight_quantizers.items()}
    return sum(bits[name] * sizes[name] for name in bits) / sum(sizes[name] for name in bits)


def random_choice(sizes: dict[str, int], budget: float, seed: int) -> list[list[Any]]:
    """Returns bits for each weight whose average is at most the budget, and close to it."""
    generator, total = random.Random(seed), sum(sizes.values())
    while True:
        chosen = {name: generator.choice(BITS) for name in sizes}
        order = sorted(sizes, key=lambda name: generator.random())
        while sum(sizes[n] * b for n, b in chosen.items()) > budget * total:
            name = generator.choice([n for n in order if chosen[n] > BITS[0]])
            chosen[name] -= 1
        if sum(sizes[n] * b for n, b in chosen.items()) > (budget - 0.05) * total:
            return [[bits, name] for name, bits in chosen.items()]


def methods(sizes: dict[str, int], budget: int, options: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """Returns the config of each way to choose; errors and traces are measured once, and read for other budgets."""
    size, samples = {"average_bits": budget}, {"num_data_points": options.samples}
    errors, traces = Path(folder) / "sensitivity" / "precision.json", Path(folder) / "hawq" / "traces.json"
    measured = {"dump_init_precision_data": True, **samples}
    of_sensitivity = {"type": "sensitivity", "budget": size, "frontier_points": 0}
    of_hawq = {"type": "hawq", "budget": size, "bits": OF_HAWQ}
    is_first = budget == options.budgets[0]
    known_errors = {"sensitivities_path": str(errors)}
    first_errors = {**measured, "dump_path": str(errors.parent)} if is_first else known_errors
    first_traces = {**measured, "dump_path": str(traces.parent), "iter_number": options.iterations}
    found = {
        "uniform": document(None, budget),
        "sensitivity": document({**of_sensitivity, **first_errors}),
        f"sensitivity, {' '.join(map(str, OF_HAWQ))}": document({**of_sensitivity, **known_errors, "bits": OF_HAWQ}),
        "hawq": document({**of_hawq, **(first_traces if is_first else {"traces_per_layer_path": str(traces)})}),
    }
    for seed in range(options.random):
        chosen = random_choice(sizes, budget, seed)
        found[f"random {seed}"] = document({"type": "manual", "bitwidth_per_scope": chosen})
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one network."""
    network = NETWORKS[name]
    data: Dataset = DATA[network.data]()
    images, labels = (part[: options.test_images] for part in data.test)
    plain = network.make().eval()
    reference = outputs_of(plain, images)
    found: dict[str, Any] = {"FP32": compared(reference, reference, labels)["accuracy"]}
    used = slice(options.training_images)
    loader = list(zip(data.train[0][used].split(64), data.train[1][used].split(64), strict=True))

    def compressed(config: dict[str, Any]) -> tuple[Any, nn.Module]:
        return create_compressed_model(copy.deepcopy(plain), config, init_loader=loader)

    names = compressed(document(None))[0].weight_quantizers
    sizes = {name: plain.get_parameter(f"{name.removesuffix('|WEIGHT')}.weight").numel() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for budget in options.budgets:
            found[str(budget)] = rows = {}
            for method, config in methods(sizes, budget, options, folder).items():
                begun = time.perf_counter()
                controller, model = compressed(config)
                seconds = round(time.perf_counter() - begun, 1)
                figures = compared(outputs_of(model, images), reference, labels)
                rows[method] = {**figures, "average bits": average_bits(controller, sizes), "seconds": seconds}
                print(name, budget, method, rows[method], flush=True)
    return found


def shown(results: dict[str, Any]) -> Table:
    """Returns the table, with the mean and the best of random choices."""
    rows: list[tuple[Any, ...]] = []
    for name, of_network in results.items():
        for budget, found in of_network.items():
            if budget == "FP32":
                continue
            drawn = [row for method, row in found.items() if method.startswith("random")]
            kept = {method: row for method, row in found.items() if not method.startswith("random")}
            keys = ("average bits", "accuracy", "agreement", "divergence")
            if drawn:
                kept[f"random, mean of {len(drawn)}"] = {k: sum(row[k] for row in drawn) / len(drawn) for k in keys}
                kept[f"random, best of {len(drawn)}"] = min(drawn, key=lambda row: row["divergence"])
            rows += [
                (
                    name,
                    budget,
                    method,
                    *(f"{row[key]:.{digits}f}" for key, digits in zip(keys, (2, 2, 2, 4), strict=True)),
                )
                for method, row in kept.items()
            ]
    headers = ("network", "budget", "bits by", "average bits", "accuracy", "same class", "divergence")
    return Table("Weights with few bits, activations with 8, batch norm adapted, not trained", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/mixed_precision.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--budgets", nargs="+", type=int, default=[4, 6])
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--training-images", type=int, default=256, help="images that everything is measured on")
    parser.add_argument("--samples", type=int, default=64, help="images on which errors and traces are measured")
    parser.add_argument("--iterations", type=int, default=12, help="random vectors of hawq")
    parser.add_argument("--random", type=int, default=3, help="random choices")
    parser.add_argument("--keep", action="store_true", help="leave other networks in the file of results as they are")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(options).items() if key not in ("networks", "keep")}
    results = measured_before(settings) if options.keep else {}
    for name in options.networks:
        measured = measure(name, options)
        # Read again: another process may have measured another network meanwhile.
        results = {**(measured_before(settings) if options.keep else results), name: measured}
        report.write("mixed_precision", {"settings": settings, "results": results})
    report.show(shown(results))


def measured_before(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file of results has of each network; figures of other settings do not stand in one table."""
    path = report.RESULTS / "mixed_precision.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise SystemExit(f"{path.name} has {content['settings']}, not {settings}: run without --keep")
    return dict(content["results"])


if __name__ == "__main__":
    main()
