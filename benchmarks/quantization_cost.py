"""What quantization costs: training step, eval forward, memory, first step, and making a compressed model.

Usage: python -m benchmarks.quantization_cost [--rounds 9] [--models resnet18 mobilenet_v2 vit vit_products] [...]
       python -m benchmarks.quantization_cost --device cuda

8 bits, weights for each channel, activations for each tensor, all scales learned. `vit_products` is the vision
transformer with activations quantized only where linear layers and convolutions read them (52 quantizers in all), as
is common for transformers; else both libraries also quantize what additions, layer norms and attention read (91).
Ratios to the plain model, CPU time of one thread, alternatives interleaved; `baseline` is the plain model against
itself. Memory is the largest sum of tensors that are alive at a time in one training step, gradients included, beyond
what was alive before it. With `--device cuda` the time is that of the GPU, and nothing is written. Where NNCF 2.16 can
be imported (see against_nncf.py), it is measured beside, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.clock import compare
from benchmarks.sparsity_cost import BATCH, SIZE, TrainingStep
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.transforms import recompute_weights
from compress_quantization import kernels
from examples.common.networks import mobilenet_v2, resnet18, resnet50, vit

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "vit": vit,
    "vit_products": vit,
}
IGNORED = {"vit_products": ["{re}.*add.*", "{re}.*scaled_dot_product.*", "{re}.*layer_norm.*", "{re}.*mean.*"]}


def document_of(name: str) -> dict[str, Any]:
    """Returns the config for one of `MODELS`: ranges from one batch, no pass for batch norm."""
    initializer = {"range": {"num_init_samples": BATCH}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    section: dict[str, Any] = {"algorithm": "quantization", "initializer": initializer}
    if name in IGNORED:
        section["activations"] = {"ignored_scopes": IGNORED[name]}
    return {"input_info": {"sample_size": [BATCH, 3, SIZE, SIZE]}, "compression": section}


def quantized(model: nn.Module, name: str) -> nn.Module:
    """Compresses a model in place, with ranges from one batch of noise."""
    loader = [(torch.randn(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH))]
    return create_compressed_model(model, document_of(name), init_loader=loader)[1]


def nncf_quantized(model: nn.Module, name: str) -> nn.Module | None:
    """Compresses a copy with NNCF; None where it is not installed."""
    try:
        from nncf import NNCFConfig  # noqa: PLC0415
        from nncf.torch import create_compressed_model as create  # noqa: PLC0415
        from nncf.torch import register_default_init_args  # noqa: PLC0415
    except ImportError:
        return None
    loader = torch.utils.data.DataLoader([(torch.randn(3, SIZE, SIZE), 0) for _ in range(BATCH)], BATCH)
    config = register_default_init_args(NNCFConfig.from_dict(document_of(name)), loader)
    compressed: nn.Module = create(model, config, dump_graphs=False)[1]
    return compressed


class EvalForward:
    """A forward of one batch in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.inputs = torch.randn(BATCH, 3, SIZE, SIZE).to(next(model.parameters()).device)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(self.inputs)


class Eager:
    """Runs something with the kernels that need no compiler."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def __call__(self) -> None:
        with eager_kernels():
            self.run()


@contextmanager
def eager_kernels() -> Iterator[None]:
    """Switches compiled kernels off."""
    before = kernels.set_compiled(False)
    try:
        yield
    finally:
        kernels.set_compiled(before)


def peak_memory(run: Callable[[], object], model: nn.Module) -> int:
    """Returns the largest number of bytes that `run` has alive at a time; it begins without gradients."""
    run()
    model.zero_grad()  # otherwise memory that was allocated before would be given back in the measured part
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def whole_model(name: str, rounds: int, *, with_eager: bool, device: str = "cpu") -> dict[str, Any]:
    """Measures one network."""
    torch.manual_seed(0)
    plain = MODELS[name]().to(device)
    ours = quantized(copy.deepcopy(plain), name)
    theirs = nncf_quantized(copy.deepcopy(plain), name) if device == "cpu" else None
    recomputing = copy.deepcopy(ours)
    recompute_weights(recomputing)
    forwards: dict[str, Callable[[], object]] = {"ours": EvalForward(ours)}
    owners: dict[str, tuple[Callable[[], object], nn.Module]] = {
        "ours": (TrainingStep(ours), ours),
        "ours, recompute_weights": (TrainingStep(recomputing), recomputing),
    }
    if with_eager:
        second = copy.deepcopy(ours)
        forwards["ours, no compiler"] = Eager(EvalForward(ours))
        owners["ours, no compiler"] = Eager(TrainingStep(second)), second
    if theirs is not None:
        forwards["NNCF"], owners["NNCF"] = EvalForward(theirs), (TrainingStep(theirs), theirs)
    steps = {key: step for key, (step, _) in owners.items()}
    base = TrainingStep(plain)
    result: dict[str, Any] = {
        "train": {key: asdict(ratio) for key, ratio in compare(base, steps, rounds, device).items()},
        "eval": {key: asdict(ratio) for key, ratio in compare(EvalForward(plain), forwards, rounds, device).items()},
    }
    plain_peak = peak_memory(base, plain)
    result["memory"] = {key: peak_memory(step, model) / plain_peak for key, (step, model) in owners.items()}
    result["memory"]["plain_mb"] = plain_peak / 2**20
    return result


def first_step(name: str) -> dict[str, float]:
    """Times the first training step in this process: kernels are compiled in it. Seconds."""
    model = quantized(MODELS[name](), name)
    step = TrainingStep(model)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return {"first": times[0], "second": times[1]}


def first_steps(names: list[str]) -> dict[str, dict[str, float]]:
    """Times first steps in fresh processes: with an empty compile cache, and with the cache of that run."""
    results: dict[str, dict[str, float]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.quantization_cost", "--first-step", name]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                results[f"{name}, {state} cache"] = json.loads(done.stdout.splitlines()[-1])
    return results


def creation() -> dict[str, float]:
    """Times `create_compressed_model` on ResNet-50 at 224 pixels, without passes over data. CPU seconds."""
    document = {
        "input_info": {"sample_size": [1, 3, 224, 224]},
        "compression": {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 0}}},
    }
    times = []
    for _ in range(4):
        model = resnet50()
        started = time.process_time()
        create_compressed_model(model, document)
        times.append(time.process_time() - started)
    return {"first": times[0], "median of the next 3": sorted(times[1:])[1]}


def table(results: dict[str, Any], device: str = "cpu") -> Table:
    """Shows all ratios."""
    rows = []
    for name, result in results.items():
        for key in result["memory"]:
            if key != "plain_mb":
                ratios = [result[kind].get(key) for kind in ("train", "eval")]
                cells = [report.quartiles(r) if r else "as above" for r in ratios]
                rows.append((name, key, *cells, f"{result['memory'][key]:.2f}"))
        noise = [f"{result[kind]['baseline']['median']:.2f}" for kind in ("train", "eval")]
        rows.append((name, "plain / plain", *noise, "1.00"))
    headers = ("model", "variant", "training step", "eval forward", "peak memory of a step")
    clock = "CPU time of one thread" if device == "cpu" else "time of the GPU"
    return Table(f"Quantized / plain, {clock}, median [quartiles]", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/quantization_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--skip-eager", action="store_true", help="leave out the kernels that need no compiler")
    parser.add_argument("--only-models", action="store_true", help="leave out first steps and creation; write nothing")
    parser.add_argument("--first-step", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: as with --only-models")
    options = parser.parse_args()
    options.only_models |= options.device != "cpu"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.first_step:
        print(json.dumps(first_step(options.first_step)))
        return
    content: dict[str, Any] = {}
    if not options.only_models:
        content["creation_resnet50_cpu_seconds"] = creation()
        print(content["creation_resnet50_cpu_seconds"], flush=True)
        content["first_step_seconds"] = first_steps([name for name in options.models if name not in IGNORED])
        print(json.dumps(content["first_step_seconds"], indent=1), flush=True)
    models: dict[str, Any] = {}
    for name in options.models:
        models[name] = whole_model(name, options.rounds, with_eager=not options.skip_eager, device=options.device)
        report.show(table({name: models[name]}, options.device))
        if not options.only_models:
            report.write("quantization_cost", {**content, "models": models})


if __name__ == "__main__":
    main()
