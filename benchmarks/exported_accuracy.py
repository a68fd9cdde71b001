"""Does the file say in its runtime what the model says in torch? Public networks on CIFAR-10, not trained further.

Usage: python -m benchmarks.exported_accuracy [--networks resnet56 vgg16-bn] [--test-images 1000] [--targets ...]

8 bits, the default config for the `target_device` of each runtime, ranges from 256 training images, no fine-tuning.
Accuracy of the network in FP32, of the fake-quantized model in torch, and of the exported file in the runtime;
`agreement` is how often the last two name the same class, `mean difference` how far their outputs are apart, in percent
of the mean absolute output, `in integers` the share of multiplications that the runtime's own profile reports. Runtimes
that are not installed are left out. Needs `make bench-data`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.exported_latency import instructions
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from compress_core.errors import ExportError
from examples.common.datasets import cifar10
from examples.common.networks import resnet56_cifar10, vgg16_bn_cifar10

NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet56": resnet56_cifar10, "vgg16-bn": vgg16_bn_cifar10}
# Target -> device, ending of the file.
TARGETS = {
    "onnxruntime": ("onnxruntime-cpu", ".onnx"),
    "openvino": ("openvino-cpu", ".onnx"),
    "executorch": ("xnnpack", ".pte"),
    "tensorrt": ("tensorrt", ".onnx"),
}
BATCH = 25
Run = Callable[[torch.Tensor], torch.Tensor]


def loaded(target: str, path: Path) -> Run:
    """Returns a function that runs a file in its runtime; TensorRT's file runs in ONNX Runtime."""
    if target == "executorch":
        from compress_core.export.executorch.runtime import Loaded  # noqa: PLC0415 - an extra

        program = Loaded(path.read_bytes())
        return lambda images: program.run([images], len(images))[0]
    from compress_core.cli.compare import runtime_of  # noqa: PLC0415

    name = "openvino" if target == "openvino" else "onnxruntime"
    session = runtime_of(name).load(path, optimized=target != "tensorrt")
    return lambda images: torch.from_numpy(session.run({session.inputs[0].name: images.numpy()})[0])


def measure(name: str, target: str, test_images: int) -> dict[str, Any]:
    """Measures one network in one runtime."""
    data, (device, ending) = cifar10(), TARGETS[target]
    test = data.test[0][:test_images], data.test[1][:test_images]
    plain = NETWORKS[name]().eval()
    section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 256}}}
    document = {
        "target_device": device,
        "input_info": {"sample_size": [1, *test[0].shape[1:]]},
        "compression": section,
    }
    loader = list(zip(data.train[0][:256].split(64), data.train[1][:256].split(64), strict=True))
    controller, model = create_compressed_model(copy.deepcopy(plain), document, init_loader=loader)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported = controller.export(Path(folder) / f"int8{ending}", test[0][:32], target=target)
        runtime = loaded(target, Path(exported.path))
        model.eval()
        batches = test[0].split(BATCH)
        outputs = {
            "FP32": torch.cat([plain(images) for images in batches]),
            "fake-quantized": torch.cat([model(images) for images in batches]),
            "file": torch.cat([runtime(images) for images in batches]),
        }
    correct = {key: 100 * (output.argmax(1) == test[1]).double().mean().item() for key, output in outputs.items()}
    of_torch, of_file = outputs["fake-quantized"], outputs["file"]
    share = exported.integer_share
    return {
        **correct,
        "agreement": 100 * (of_torch.argmax(1) == of_file.argmax(1)).double().mean().item(),
        "mean difference": 100 * ((of_torch - of_file).abs().mean() / of_torch.abs().mean()).item(),
        "in integers": None if share is None else 100 * share,
        "MB": exported.size / 1e6,
    }


def shown(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Returns the table."""
    figures = ("FP32", "fake-quantized", "file", "agreement", "mean difference", "in integers", "MB")
    rows = [
        (name, target, *("-" if row[key] is None else f"{row[key]:.2f}" for key in figures))
        for name, of_network in results.items()
        for target, row in of_network.items()
    ]
    headers = ("network", "target", *figures)
    return Table("Public networks on CIFAR-10, quantized without fine-tuning; percent", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/exported_accuracy.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--test-images", type=int, default=1000)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, Any]] = {}
    for name in options.networks:
        results[name] = {}
        for target in options.targets:
            try:
                results[name][target] = measure(name, target, options.test_images)
            except ExportError as error:
                print(f"{name} for {target}: {error}", flush=True)
        found = {"instructions": instructions(), "test_images": options.test_images, "results": results}
        report.write("exported_accuracy", found)
    report.show(shown(results))


if __name__ == "__main__":
    main()
