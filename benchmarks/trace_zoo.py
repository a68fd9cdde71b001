"""Which public networks can be traced, and what that costs against one plain forward of the same inputs.

Usage: python -m benchmarks.trace_zoo [--only torchvision|pytorchcv|transformers] [--name PART] [--rounds 3]

Takes what is installed of torchvision (all classifiers), pytorchcv (one of each family) and transformers (tiny
configs), with random weights. CPU time of one thread; the first trace of a network does not count.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import report
from compress_core.statistics import Table
from compress_core.trace import Example, trace

# Class -> (keywords of the config, names of the inputs: pixels of a shape, or tokens).
TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "pixels"),
    "RegNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, "pixels"),
    "MobileNetV1": ({"depth_multiplier": 0.25, "image_size": 64}, "pixels"),
    "MobileNetV2": ({"depth_multiplier": 0.25, "image_size": 64}, "pixels"),
    "EfficientNet": ({"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, "pixels"),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pixels"),
    "ConvNextV2": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pixels"),
    "Swin": ({"image_size": 64, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}, "pixels"),
    "ViT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 64,
        },
        "pixels",
    ),
    "DeiT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 64,
        },
        "pixels",
    ),
    "Segformer": (
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
        "pixels",
    ),
    "MobileViT": (
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
        "pixels",
    ),
    "PoolFormer": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, "pixels"),
    "Bert": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "Roberta": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "DistilBert": ({"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}, "tokens"),
    "GPT2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}, "tokens"),
    "OPT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "vocab_size": 50,
            "word_embed_proj_dim": 16,
        },
        "tokens",
    ),
    "Llama": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "T5": ({"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}, "pair"),
}


@dataclass
class Result:
    """What became of one network; times in seconds of CPU."""

    network: str
    error: str = ""
    first: float = 0.0
    seconds: float = 0.0
    forward: float = 0.0
    calls: int = 0
    operators: int = 0
    values: str = "fake"
    unreached: tuple[str, ...] = ()


Network = tuple[str, Callable[[], nn.Module], Callable[[], Example]]


def torchvision_networks() -> Iterator[Network]:
    """Yields all classifiers."""
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        yield (
            name,
            lambda name=name, options=options: models.get_model(name, weights=None, **options),  # type: ignore[misc]
            lambda: Example.of(torch.randn(1, 3, 224, 224)),
        )


def pytorchcv_networks() -> Iterator[Network]:
    """Yields one network of each family: the first of those that are called the same up to a number."""
    provider = importlib.import_module("pytorchcv.model_provider")
    families: dict[str, str] = {}
    for name in provider._models:
        families.setdefault(re.split(r"\d", name)[0], name)
    for name in families.values():
        yield name, lambda name=name: provider.get_model(name), lambda: Example.of(torch.randn(1, 3, 224, 224))  # type: ignore[misc]


def define_missing_operators() -> None:
    """Makes a torchvision importable that comes without its C++ operators; transformers imports it, too."""
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def _sized_example(model: nn.Module) -> Example:
    size = getattr(model, "in_size", None) or (224, 224)
    return Example.of(torch.randn(1, getattr(model, "in_channels", 3), *size))


def transformers_networks() -> Iterator[Network]:
    """Yields tiny models."""
    library = importlib.import_module("transformers")
    for family, (options, kind) in TRANSFORMERS.items():
        if not hasattr(library, f"{family}Config"):
            continue

        def make(family: str = family, options: dict[str, Any] = options) -> nn.Module:
            config = getattr(library, f"{family}Config")(**options)
            model: nn.Module = getattr(library, f"{family}Model")(config)
            return model

        yield f"{family}Model", make, lambda kind=kind: _example(kind)  # type: ignore[misc]


def _example(kind: str) -> Example:
    if kind == "pixels":
        return Example.of(pixel_values=torch.randn(2, 3, 64, 64))
    tokens = torch.randint(2, 50, (2, 7))
    if kind == "pair":
        return Example.of(input_ids=tokens, decoder_input_ids=tokens)
    return Example.of(input_ids=tokens, attention_mask=torch.ones_like(tokens))


SOURCES = {
    "torchvision": torchvision_networks,
    "pytorchcv": pytorchcv_networks,
    "transformers": transformers_networks,
}


def measure(network: Network, rounds: int) -> Result:
    """Traces a network and times it."""
    name, make, make_example = network
    result = Result(name)
    try:
        model = make().eval()
        example = _sized_example(model) if hasattr(model, "in_size") else make_example()
        started = time.process_time()
        found = trace(model, example)
        result.first = time.process_time() - started
        seconds = [_cpu_time(lambda: trace(model, example)) for _ in range(rounds)]
        with torch.no_grad():
            forwards = [_cpu_time(lambda: example.run(model, example.batch)) for _ in range(rounds)]
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"[:300]
        return result
    forward = found.forwards[0]
    result.seconds, result.forward = statistics.median(seconds), statistics.median(forwards)
    result.calls, result.operators = len(forward.calls), len(forward.operators)
    result.values, result.unreached = "real" if forward.real else "fake", tuple(found.unreached)
    return result


def _cpu_time(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def summary(source: str, results: list[Result]) -> tuple[Any, ...]:
    """Returns a row of the table."""
    traced = [result for result in results if not result.error]
    seconds = [result.seconds for result in traced] or [0.0]
    return (
        source,
        f"{len(traced)} of {len(results)}",
        sum(result.values == "real" for result in traced),
        sum(bool(result.unreached) for result in traced),
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
        f"{statistics.median([r.seconds / r.forward for r in traced] or [0.0]):.1f}",
    )


def main() -> None:
    """Measures, prints, and writes results/trace_zoo.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SOURCES))
    parser.add_argument("--name", default="", help="only networks whose name contains this; nothing is written then")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    define_missing_operators()
    rows, everything = [], {}
    for source in [options.only] if options.only else SOURCES:
        try:
            networks = [network for network in SOURCES[source]() if options.name in network[0]]
        except ImportError as error:
            print(f"{source}: skipped, {error}", flush=True)
            continue
        results = []
        for network in networks:
            torch.manual_seed(0)
            results.append(measure(network, options.rounds))
            print(results[-1], flush=True)
        rows.append(summary(source, results))
        everything[source] = [asdict(result) for result in results]
        if not options.name and not options.only:
            report.write("trace_zoo", {"input": "(1, 3, 224, 224), or the network's own size", "networks": everything})
    headers = (
        "networks",
        "traced",
        "on real values",
        "with unreached modules",
        "median s",
        "most s",
        "trace / forward",
    )
    report.show(Table("One trace in eval mode, CPU time of one thread", headers, rows))


if __name__ == "__main__":
    main()
