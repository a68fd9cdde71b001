"""Batch-norm adaptation in NNCF 2.16 and here: what a pass costs, and whether the same estimator gives the same.

Usage, in an environment of its own: pip install nncf==2.16.0 torch==2.13.0, then
    PYTHONPATH=.:plugins/magnitude_sparsity python -m benchmarks.bn_against_nncf [--rounds 7]

Every pass is divided by a plain forward without gradients of the uncompressed model over the same samples; CPU time of
one thread. NNCF builds a C++ extension for its quantizers on their first call: that is done before, and takes a minute.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import report
from benchmarks.against_nncf import our_registry, zeros
from benchmarks.bn_cost import BATCH, SAMPLES, SIZE, adapt, plain_forward
from benchmarks.clock import Ratio, compare
from compress_core import create_compressed_model, mask_weight
from compress_core.contract.statistics import Table
from compress_core.registry import use_registry
from examples.common.networks import mobilenet_v2, resnet18

LEVEL = 0.5
INPUT = {"input_info": {"sample_size": [BATCH, 3, SIZE, SIZE]}}
SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": LEVEL, "params": {"sparsity_target": LEVEL}}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": BATCH}}}


class Peer:
    """A model that NNCF has compressed, and NNCF's adaptation of it."""

    def __init__(self, model: nn.Module, section: dict[str, Any], images: torch.Tensor) -> None:
        from nncf import NNCFConfig  # noqa: PLC0415
        from nncf.common.initialization.batchnorm_adaptation import BatchnormAdaptationAlgorithm  # noqa: PLC0415
        from nncf.torch import create_compressed_model as create  # noqa: PLC0415
        from nncf.torch import register_default_init_args  # noqa: PLC0415
        from nncf.torch.initialization import wrap_dataloader_for_init  # noqa: PLC0415

        loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=BATCH)
        off: dict[str, Any] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
        section = {**section, "initializer": {**section.get("initializer", {}), **off}}
        config = register_default_init_args(NNCFConfig.from_dict({**INPUT, "compression": section}), loader)
        self.controller, self.model = create(model, config, dump_graphs=False)
        self.model.eval()
        self.run = functools.partial(
            BatchnormAdaptationAlgorithm(wrap_dataloader_for_init(loader), len(images)).run, self.model
        )


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns the batch norms by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def sparse_here(base: nn.Module) -> nn.Module:
    """Returns a copy with our masks."""
    return create_compressed_model(copy.deepcopy(base), {"compression": SPARSITY})[1].eval()


def settled(make: Any, images: torch.Tensor) -> nn.Module:
    """Returns a model whose statistics are not the initial ones."""
    torch.manual_seed(0)
    model: nn.Module = make()
    model.train()
    with torch.no_grad():
        model(images[:BATCH])
    return model.eval()


def costs(base: nn.Module, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Times the passes against a plain forward of the uncompressed model."""
    batches = list(images.split(BATCH))
    sparse, quantized = (Peer(copy.deepcopy(base), section, images) for section in (SPARSITY, QUANTIZATION))
    mine = sparse_here(base)
    runs: dict[str, Callable[[], object]] = {
        f"ours, sparse, {method}": functools.partial(adapt, mine, batch_norms(mine), batches, method)
        for method in ("momentum", "exact", "paired")
    }
    runs |= {
        "NNCF, sparse": sparse.run,
        "NNCF, quantized": quantized.run,
        "NNCF, sparse, plain forward": functools.partial(plain_forward, sparse.model, batches),
        "NNCF, quantized, plain forward": functools.partial(plain_forward, quantized.model, batches),
    }
    found = compare(functools.partial(plain_forward, base, batches), runs, rounds)
    return {name: asdict(ratio) for name, ratio in found.items()}


def conformance(base: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Adapts the same weights in both, with the same samples in the same batches, and returns the largest differences.

    NNCF's masks are taken over, so that the rules by which masks are made play no part. Differences of means are in
    standard deviations, those of variances relative.
    """
    peer = Peer(copy.deepcopy(base), SPARSITY, images)
    mine = copy.deepcopy(base)
    for name, masked in zeros(peer.controller).items():
        mask_weight(mine, f"{name}.weight", (~masked).float())
    peer.run()
    adapt(mine, batch_norms(mine), list(images.split(BATCH)), "momentum")
    before, theirs, ours = (
        {n: moments(m) for n, m in batch_norms(model).items()} for model in (base, peer.model, mine)
    )
    assert before.keys() == theirs.keys() == ours.keys()
    return {
        "mean": max(mean_gap(theirs[name], ours[name]) for name in ours),
        "variance": max(variance_gap(theirs[name], ours[name]) for name in ours),
        "change of mean": max(mean_gap(before[name], ours[name]) for name in ours),
        "change of variance": max(variance_gap(before[name], ours[name]) for name in ours),
    }


def moments(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the running statistics in float64."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean.double(), layer.running_var.double()


def mean_gap(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Returns the largest difference of means, in standard deviations of the first."""
    return float(((other[0] - one[0]).abs() / one[1].sqrt()).max())


def variance_gap(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Returns the largest relative difference of variances."""
    return float(((other[1] - one[1]).abs() / one[1]).max())


def main() -> None:
    """Compares, prints, and writes results/bn_against_nncf.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    try:
        import nncf  # noqa: PLC0415
    except ImportError:
        sys.exit("NNCF is not installed here: pip install nncf==2.16.0 in an environment of its own")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    gaps: dict[str, dict[str, float]] = {}
    with use_registry(our_registry()):
        for name, make in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
            torch.manual_seed(1)
            images = torch.randn(SAMPLES, 3, SIZE, SIZE)
            base = settled(make, images)
            gaps[name] = conformance(base, images)
            results[name] = costs(base, images, options.rounds)
            content = {"samples": SAMPLES, "batch": BATCH, "size": SIZE, "ratios": results, "momentum": gaps}
            report.write("bn_against_nncf", {"nncf": nncf.__version__, **content})
    rows = [(run, *(text(found[run]) for found in results.values())) for run in results["resnet18"]]
    report.show(
        Table("Pass / plain forward of the uncompressed model, CPU time, median [quartiles]", ("pass", *results), rows),
        Table(
            "NNCF's adaptation and `momentum`, same weights and batches: largest differences",
            ("statistic", *gaps),
            [(key, *(f"{gap[key]:.1e}" for gap in gaps.values())) for key in gaps["resnet18"]],
        ),
    )


def text(ratio: dict[str, float]) -> str:
    """Returns a ratio as `compare` prints it."""
    return str(Ratio(**ratio))


if __name__ == "__main__":
    main()
