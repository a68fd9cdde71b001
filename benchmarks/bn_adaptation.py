"""The estimators of batch-norm adaptation compared, on trained networks, without any fine-tuning.

Usage: python -m benchmarks.bn_adaptation [--nets ...] [--cases N ...] [--draws 3] [--test-images 2000] [--grid small]

For each network and compression: accuracy without adaptation, and for each estimator, number of samples and batch size
the mean and the spread over several draws of samples. The test images are the same for all.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import report
from benchmarks.compressions import CASES, Compression
from compress_core.batchnorm.forward_pass import AdaptationPass
from compress_core.contract.statistics import Table
from compress_core.data.calibration import CalibrationData, InitArgs
from compress_core.transforms import bypass_transforms
from examples.common.datasets import DATASETS, Dataset
from examples.common.fetch import cache_folder
from examples.common.networks import demo_network, resnet56_cifar10, vgg16_bn_cifar10
from examples.common.training import accuracy, augmented, train

SETTLE = (
    "what the running statistics before compression describe: what training has left, or exact moments over augmented "
    "or over clean training images (to find out what the estimators owe to them)"
)
METHODS = ("momentum", "exact", "paired")
GRIDS = {
    "full": [(n, b) for n in (32, 64, 256, 2048) for b in (8, 32, 128, 512) if b <= n],
    "small": [(32, 8), (32, 32), (64, 8), (64, 32), (256, 8), (256, 128), (2048, 32), (2048, 512)],
}


@dataclass(frozen=True)
class Network:
    """A trained network and its data."""

    data: str
    make: Callable[[], nn.Module]


def trained_here(name: str, epochs: int, flip: bool) -> nn.Module:
    """Returns the demo's network for a data set, trained once and kept in the cache."""
    checkpoint = cache_folder() / f"{name}-{epochs}-epochs.pt"
    model = demo_network(name)
    if not checkpoint.exists():
        torch.manual_seed(0)
        model = demo_network(name)
        loader = DATASETS[name]().loader(train=True, batch_size=128, shuffle=True)
        train(model, loader, epochs=epochs, max_lr=0.2, flip=flip)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), checkpoint)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


NETWORKS = {
    "digits": Network("digits", functools.partial(trained_here, "digits", 20, False)),
    "fashion-resnet": Network("fashion-mnist", functools.partial(trained_here, "fashion-mnist", 8, True)),
    "resnet56": Network("cifar10", resnet56_cifar10),
    "vgg16-bn": Network("cifar10", vgg16_bn_cifar10),
}


def settle(model: nn.Module, data: Dataset, statistics_of: str, *, flip: bool) -> None:
    """Replaces the running statistics that training has left by exact ones; see the option `--statistics`."""
    if statistics_of == "training":
        return
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over batches
    torch.manual_seed(3)
    model.train()
    with torch.no_grad():
        for _ in range(20 if statistics_of == "augmented" else 1):
            for batch in data.train[0][:4096].split(512):
                model(augmented(batch, flip=flip) if statistics_of == "augmented" else batch)
    model.eval()
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum


class Measurement:
    """One compressed network, adapted in many ways."""

    def __init__(self, base: nn.Module, case: Compression, data: Dataset, test_images: int) -> None:
        self.model = copy.deepcopy(base)
        case.apply(self.model)
        self.model.eval()
        self.data = data
        self.test = (data.test[0][:test_images], data.test[1][:test_images])
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        self.trained = {name: copy.deepcopy(m.state_dict()) for name, m in self.layers.items()}

    def adapted(self, method: str, samples: int, batch: int, draw: int) -> float:
        """Returns the accuracy after an adaptation that starts from the trained statistics."""
        for name, layer in self.layers.items():
            layer.load_state_dict(self.trained[name])
        generator = torch.Generator().manual_seed(1000 + draw)
        chosen = torch.randperm(len(self.data.train[0]), generator=generator)[:samples]
        calibration = CalibrationData(InitArgs(self.data.train[0][chosen].split(batch)), "benchmark")
        with AdaptationPass(self.model, self.layers, method) as adaptation:
            reference = functools.partial(bypass_transforms, self.model) if adaptation.needs_reference else None
            adaptation.run(calibration, calibration.batches(samples), reference=reference)
            adaptation.finish(samples)
        return accuracy(self.model, self.test)


def measure(
    measurement: Measurement, grid: list[tuple[int, int]], draws: Callable[[int], int]
) -> Iterator[dict[str, Any]]:
    """Yields a row for each estimator, number of samples and batch size."""
    available = len(measurement.data.train[0])
    for samples, batch in grid:
        if samples > 2 * available:
            continue
        for method in METHODS:
            found = [measurement.adapted(method, samples, batch, draw) for draw in range(draws(samples))]
            yield {
                "method": method,
                "samples": samples,
                "batch": batch,
                "mean": statistics.fmean(found),
                "spread": max(found) - min(found),
                "draws": found,
            }


def summary(rows: list[dict[str, Any]], none: float) -> dict[str, float]:
    """Returns how the goal is met: paired with 64 samples against the best of all others, and batch-size dependence."""
    others = [row["mean"] for row in rows if row["method"] != "paired"]
    paired = [row for row in rows if row["method"] == "paired"]
    with_64 = [row["mean"] for row in paired if row["samples"] == 64]
    by_samples = {n: [row["mean"] for row in paired if row["samples"] == n] for n in {row["samples"] for row in paired}}
    return {
        "none": none,
        "best other": max(others),
        "paired 64": min(with_64),
        "paired 64 - best other": min(with_64) - max(others),
        "paired 64 - none": min(with_64) - none,
        "batch-size dependence": max(max(v) - min(v) for v in by_samples.values()),
    }


def table(name: str, results: dict[str, Any]) -> Table:
    """One row for each compression, one column for each estimator and number of samples (worst batch size)."""
    columns = sorted({(row["samples"], METHODS.index(row["method"])) for r in results.values() for row in r["rows"]})
    rows = []
    for case, result in results.items():
        cells = []
        for samples, method in columns:
            found = [r for r in result["rows"] if (r["samples"], r["method"]) == (samples, METHODS[method])]
            low, high = min(r["mean"] for r in found), max(r["mean"] for r in found)
            cells.append(f"{low:.1f}" if high - low < 0.05 else f"{low:.1f}..{high:.1f}")
        rows.append((case, f"{result['summary']['none']:.1f}", *cells))
    headers = ("compression", "none", *(f"{METHODS[m]} {n}" for n, m in columns))
    return Table(f"{name}: accuracy in % (lowest..highest mean over batch sizes)", headers, rows)


def goals(name: str, results: dict[str, Any]) -> Table:
    """The summary of each compression."""
    keys = ("none", "best other", "paired 64", "paired 64 - best other", "paired 64 - none", "batch-size dependence")
    rows = [(case, *(round(r["summary"][key], 2) for key in keys)) for case, r in results.items()]
    return Table(f"{name}: paired with 64 samples", ("compression", *keys), rows)


def file_name(net: str, statistics_of: str) -> str:
    """Returns the name of the results of a network."""
    return f"bn_adaptation-{net}" + ("" if statistics_of == "training" else f"-{statistics_of}")


def in_order(results: dict[str, Any]) -> dict[str, Any]:
    """Returns results in the order of the cases."""
    return {str(case): results[str(case)] for case in CASES if str(case) in results}


def earlier_results(net: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the cases measured in earlier runs with the same settings, so that hours need not be spent at once."""
    path = report.RESULTS / f"{file_name(net, settings['statistics'])}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, Any] = content["results"] if content.get("settings") == settings else {}
    return results


def render(names: list[str], statistics_of: str) -> None:
    """Prints what docs/adaptation.md quotes: for each network the numbers of samples 64 and 2048, and the goals."""
    for name in names:
        path = report.RESULTS / f"{file_name(name, statistics_of)}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        results, settings = content["results"], content["settings"]
        kept = {
            case: {**r, "rows": [row for row in r["rows"] if row["samples"] in (64, 2048)]}
            for case, r in results.items()
        }
        print(f"### {name}: FP32 {content['fp32']:.2f} %, {settings['test_images']} test images\n")
        for part in (table(name, kept), goals(name, results)):
            print("| " + " | ".join(part.headers) + " |\n|" + " --- |" * len(part.headers))
            print("\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in part.rows), end="\n\n")


def main() -> None:
    """Measures, prints, and writes results/bn_adaptation-NET.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="indices")
    parser.add_argument("--grid", choices=list(GRIDS), default="full")
    parser.add_argument("--largest", type=int, default=2048, help="leave larger numbers of samples out")
    parser.add_argument("--draws", type=int, default=3, help="draws of samples for each setting")
    parser.add_argument("--large-draws", type=int, default=3, help="the same for more than 1000 samples")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--statistics", choices=("training", "augmented", "clean"), default="training", help=SETTLE)
    parser.add_argument("--render", action="store_true", help="print the tables of earlier results as Markdown")
    options = parser.parse_args()
    if options.render:
        render(options.nets, options.statistics)
        return
    torch.set_num_threads(options.threads)
    draws = lambda samples: options.large_draws if samples > 1000 else options.draws  # noqa: E731
    grid = [pair for pair in GRIDS[options.grid] if pair[0] <= options.largest]
    for name in options.nets:
        network = NETWORKS[name]
        data, base = DATASETS[network.data](), network.make()
        settle(base, data, options.statistics, flip=network.data != "digits")
        images = min(options.test_images, len(data.test[1]))
        settings = {key: getattr(options, key) for key in ("grid", "largest", "draws", "large_draws")}
        settings |= {"test_images": images, "statistics": options.statistics}
        results = earlier_results(name, settings)
        started = time.perf_counter()
        fp32 = accuracy(base, (data.test[0][: options.test_images], data.test[1][: options.test_images]))
        print(f"{name}: FP32 {fp32:.2f} %", flush=True)
        for case in (CASES[index] for index in options.cases):
            measurement = Measurement(base, case, data, options.test_images)
            none = accuracy(measurement.model, measurement.test)
            rows = list(measure(measurement, grid, draws))
            results = in_order(results | {str(case): {"rows": rows, "summary": summary(rows, none)}})
            print(f"{name}, {case}: {time.perf_counter() - started:.0f} s", flush=True)
            report.write(file_name(name, options.statistics), {"settings": settings, "fp32": fp32, "results": results})
        report.show(table(name, results), goals(name, results))


if __name__ == "__main__":
    main()
