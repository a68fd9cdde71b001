"""Peak memory and time of weight reconstruction on ResNet-50 at 224x224 pixels.

Usage: python -m benchmarks.reconstruction_memory [--samples 512] [--memory 1.5] [--threads 2]

80 % sparse, random weights and images: neither matters here. Memory is the largest resident set of the process less
what it holds with two copies of the model and the images, just before one is compressed. `--memory` is the bound of the
config, in GiB.
"""

from __future__ import annotations

import argparse
import copy
import logging
import resource
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.reconstruction import forward_seconds, reconstructions_timed
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.networks import resnet50

BATCH, HELD_OUT = 32, 128


def resident() -> float:
    """Returns the resident set of this process now, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def largest() -> float:
    """Returns the largest resident set of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measures, prints, and writes results/reconstruction_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--memory", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    base = resnet50().eval()
    images = list(torch.randn(options.samples + HELD_OUT, 3, 224, 224).split(BATCH))
    plain = forward_seconds(base, images[:2], 2 * BATCH) * options.samples / (2 * BATCH)
    model, before = copy.deepcopy(base), resident()
    section = {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": 0.8,
        "params": {"sparsity_target": 0.8},
        "initializer": {"weight_reconstruction": {"num_samples": options.samples, "memory": options.memory}},
    }
    start = time.perf_counter()
    with reconstructions_timed() as seconds:
        controller, _ = create_compressed_model(model, {"compression": section}, init_loader=images)
    result = {
        "samples": options.samples,
        "bound_gib": options.memory,
        "peak_gb": largest() - before,
        "forwards": sum(seconds) / plain,
        "wall_seconds": time.perf_counter() - start,
        "notes": list(controller.statistics().weight_reconstruction.report.notes),
    }
    report.write("reconstruction_memory", result)
    report.show(Table("ResNet-50, 224x224 pixels, 80 % sparse", ("figure", "value"), list(result.items())))


if __name__ == "__main__":
    main()
