"""Weight reconstruction: accuracy before any training, on networks with public weights and some trained here.

Usage: python -m benchmarks.reconstruction [--nets resnet56 ...] [--cases "90 % sparse" ...] [--samples 256]
       [--draws 3] [--test-images 10000] [--variants ...] [--held-back] [--render]

For each network and compression: accuracy as it is, corrected without data, with batch norm adapted, with weights
reconstructed, with both, and with both where data has also chosen what goes. No labels, no training. All variants of a
draw use the same samples. Cost is the CPU time of the reconstruction in units of one plain forward over the same
samples, measured just before. Results are added to
those of earlier runs, so that hours need not be spent at once. `--held-back` measures on the last 5,000 training images
instead: settings are chosen there. 2:4 needs `pip install examples/plugins/compress-nm-sparsity`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.reconstruction_cases import CASES, NETWORKS, VARIANTS, Case, trained
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.torch_internals import AnyBatchNorm
from compress_weight_reconstruction.reconstruction import Reconstruction
from compress_weight_reconstruction.report import ReconstructionReport
from examples.common.datasets import DATASETS, Dataset
from examples.common.training import accuracy

BATCH = 64
HELD_BACK = 5000
WITHOUT_DATA = ("none", "data-free")
# Other images, on which reconstruction compares the model's outputs before and after.
_COMPARED = 0.25


def samples_of(data: Dataset, number: int, draw: int) -> list[torch.Tensor]:
    """Returns training images in batches: those to compute with, and some to compare outputs on."""
    available = len(data.train[0]) - (HELD_BACK if len(data.train[0]) > 2 * HELD_BACK else 0)
    generator = torch.Generator().manual_seed(1000 + draw)
    wanted = min(available, number + max(BATCH, round(_COMPARED * number)))
    return list(data.train[0][torch.randperm(available, generator=generator)[:wanted]].split(min(BATCH, number)))


def forward_seconds(model: nn.Module, batches: list[torch.Tensor], samples: int) -> float:
    """Returns the CPU time of one plain forward over the samples."""
    used = batches[: max(1, samples // len(batches[0]))]
    found = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            for batch in used:
                model(batch)
            found.append(time.process_time() - start)
    return statistics.median(found)


@contextlib.contextmanager
def reconstructions_timed() -> Iterator[list[float]]:
    """Context manager that gives a list, to which the CPU time of each reconstruction is added."""
    run, seconds = Reconstruction.run, []

    def timed(reconstruction: Reconstruction) -> ReconstructionReport:
        start = time.process_time()
        result = run(reconstruction)
        seconds.append(time.process_time() - start)
        return result

    Reconstruction.run = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Reconstruction.run = run  # type: ignore[method-assign]


class Run:
    """Measures one network.

    Args:
        net: Its name.
        options: The command line.
    """

    def __init__(self, net: str, options: argparse.Namespace) -> None:
        self.net, self.options = net, options
        self.base, self.data = trained(net), DATASETS[NETWORKS[net].data]()
        self.has_norms = any(isinstance(module, AnyBatchNorm) for module in self.base.modules())
        part = self.data.train if options.held_back else self.data.test
        chosen = slice(-HELD_BACK, None) if options.held_back else slice(options.test_images)
        self.test = (part[0][chosen], part[1][chosen])
        self.name = f"reconstruction-{net}" + ("-held-back" if options.held_back else "")
        path = report.RESULTS / f"{self.name}.json"
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self.content.pop("machine", None)
        self.content["fp32"] = self.content.get("fp32") or accuracy(self.base, self.test)

    def all(self) -> None:
        """Measures what earlier runs have not, and writes it after each cell."""
        for draw in range(self.options.draws):
            for samples in self.options.samples:
                for case in self.options.cases:
                    for variant in self.options.variants:
                        self._cell(CASES[case], variant, samples, draw)

    def _cell(self, case: Case, variant: str, samples: int, draw: int) -> None:
        if variant in WITHOUT_DATA:
            # No samples are used, but for ranges of activations.
            samples, draw = 256, 0
        key = {"case": case.name, "variant": variant, "samples": samples, "draw": draw, "images": len(self.test[1])}
        if any(all(row[name] == value for name, value in key.items()) for row in self.content["rows"]):
            return
        if (variant == "chosen" and not case.can_choose) or not _is_installed(case):
            return
        if not self.has_norms and variant in ("data-free", "adaptation", "reconstruction"):
            return  # the same as "none" or "both"
        row = {**key, **self._measured(case, variant, samples, draw)}
        self.content["rows"].append(row)
        report.write(self.name, self.content)
        print(self.net, row, flush=True)

    def _measured(self, case: Case, variant: str, samples: int, draw: int) -> dict[str, Any]:
        batches = samples_of(self.data, samples, draw)
        plain = forward_seconds(self.base, batches, samples)
        size = list(self.test[0].shape[1:])
        document = case.document(variant, samples, size, has_norms=self.has_norms)
        start = time.process_time()
        with reconstructions_timed() as seconds:
            controller, model = create_compressed_model(copy.deepcopy(self.base), document, init_loader=batches)
        row: dict[str, Any] = {"creation": (time.process_time() - start) / plain}
        figures = controller.statistics()
        if variant in ("reconstruction", "both", "chosen"):
            found = figures.weight_reconstruction.report
            row |= {"kept": found.kept, "layers": len(found.layers), "left_alone": dict(found.left_alone)}
            row |= {"forwards": sum(seconds) / plain}
        return {"accuracy": accuracy(model, self.test), **row}


def _is_installed(case: Case) -> bool:
    return case.name != "2:4 sparse" or importlib.util.find_spec("compress_nm_sparsity") is not None


def table(net: str, content: dict[str, Any], samples: int, *, all_images: bool = True) -> Table:
    """One row for each compression and number of test images, means over draws; empty columns are left out.

    Args:
        net: The network.
        content: Its results.
        samples: Number of samples.
        all_images: Whether smaller numbers of test images have rows, too.
    """
    rows = []
    for case in CASES:
        numbers = sorted({row["images"] for row in content["rows"] if row["case"] == case})
        for images in numbers if all_images else numbers[-1:]:
            found = [
                row
                for row in content["rows"]
                if (row["case"], row["images"]) == (case, images)
                and (row["samples"] == samples or row["variant"] in WITHOUT_DATA)
            ]
            by_variant = {v: [row["accuracy"] for row in found if row["variant"] == v] for v in VARIANTS}
            cells = [f"{statistics.fmean(values):.1f}" if values else "" for values in by_variant.values()]
            spread = max((max(values) - min(values) for values in by_variant.values() if values), default=0.0)
            costs = [row["forwards"] for row in found if "forwards" in row]
            cost = f"{statistics.median(costs):.1f}" if costs else ""
            rows.append((case, str(images), *cells, f"{spread:.1f}" if spread else "", cost))
    headers = ("compression", "test images", *VARIANTS, "largest spread of draws", "cost, plain forwards")
    used = [column for column in range(len(headers)) if any(row[column] for row in rows)]
    title = f"{net}, {samples} samples: accuracy in %, FP32 {content['fp32']:.2f}"
    return Table(title, tuple(headers[c] for c in used), [tuple(row[c] for c in used) for row in rows])


def render(options: argparse.Namespace) -> None:
    """Prints what docs/reconstruction.md quotes."""
    for net in options.nets:
        path = report.RESULTS / f"reconstruction-{net}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        for samples in options.samples:
            part = table(net, content, samples, all_images=False)
            print(f"### {part.title}\n")
            print("| " + " | ".join(part.headers) + " |\n|" + " --- |" * len(part.headers))
            print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in part.rows), end="\n\n")


def main() -> None:
    """Measures, prints, and writes results/reconstruction-NET.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--samples", nargs="+", type=int, default=[256])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--held-back", action="store_true", help="measure on training images, to choose settings")
    parser.add_argument("--render", action="store_true", help="print the tables of earlier results as Markdown")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.render:
        render(options)
        return
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    for net in options.nets:
        run = Run(net, options)
        run.all()
        report.show(*(table(net, run.content, samples) for samples in options.samples))


if __name__ == "__main__":
    main()
