"""Does the integer file say what the model in torch says? Public networks on CIFAR-10, quantized after training.

Usage: python -m benchmarks.exported_accuracy [--networks resnet56 vgg16-bn] [--test-images 1000]

8 bits, the default config, ranges from 256 training images, no fine-tuning. Accuracy of the network in FP32, of the
fake-quantized model in torch, and of the exported file in ONNX Runtime; `agreement` is how often the last two name the
same class, `mean difference` how far their outputs are apart, in percent of the mean absolute output. The defaults are
NNCF's: weights use 7 of their 8 bits. With all 8 (`"overflow_fix": "disable"`), processors without VNNI lose the top of
sums of two products, and `export_onnx` would refuse to write the file there. Needs `make bench-data` and the
extra `[onnx]`.
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
from compress_core import create_compressed_model
from compress_core.contract.statistics import Table
from examples.common.datasets import cifar10
from examples.common.networks import resnet56_cifar10, vgg16_bn_cifar10
from examples.demo_quantization import OnnxModel

NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet56": resnet56_cifar10, "vgg16-bn": vgg16_bn_cifar10}
SETTINGS: dict[str, dict[str, Any]] = {"defaults": {}, "8-bit weights": {"overflow_fix": "disable"}}
BATCH = 250


def measure(name: str, settings: dict[str, Any], test_images: int) -> dict[str, Any]:
    """Measures one network with one config."""
    data = cifar10()
    test = data.test[0][:test_images], data.test[1][:test_images]
    plain = NETWORKS[name]().eval()
    section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 256}}, **settings}
    document = {"input_info": {"sample_size": [1, *test[0].shape[1:]]}, "compression": section}
    loader = list(zip(data.train[0][:256].split(64), data.train[1][:256].split(64), strict=True))
    controller, model = create_compressed_model(copy.deepcopy(plain), document, init_loader=loader)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # What is measured here is the difference that this call would refuse.
        exported = controller.export_onnx(Path(folder) / "int8.onnx", test[0][:64], tolerance=float("inf"))
        runtime = OnnxModel(Path(exported.path))
        model.eval()
        batches = test[0].split(BATCH)
        outputs = {
            "FP32": torch.cat([plain(images) for images in batches]),
            "fake-quantized": torch.cat([model(images) for images in batches]),
            "file": torch.cat([runtime(images) for images in batches]),
        }
    correct = {key: 100 * (output.argmax(1) == test[1]).double().mean().item() for key, output in outputs.items()}
    of_torch, of_file = outputs["fake-quantized"], outputs["file"]
    return {
        **correct,
        "agreement": 100 * (of_torch.argmax(1) == of_file.argmax(1)).double().mean().item(),
        "mean difference": 100 * ((of_torch - of_file).abs().mean() / of_torch.abs().mean()).item(),
    }


def shown(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Returns the table."""
    headers = ("network", "config", "FP32", "fake-quantized", "file", "agreement", "mean difference")
    rows = [
        (name, settings, *(f"{row[key]:.2f}" for key in headers[2:]))
        for name, of_network in results.items()
        for settings, row in of_network.items()
    ]
    return Table("Public networks on CIFAR-10, quantized without fine-tuning; percent", headers, rows)


def main() -> None:
    """Measures, prints, and writes results/exported_accuracy.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--test-images", type=int, default=1000)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, Any]] = {}
    for name in options.networks:
        results[name] = {key: measure(name, settings, options.test_images) for key, settings in SETTINGS.items()}
        report.write("exported_accuracy", {"test_images": options.test_images, "results": results})
    report.show(shown(results))


if __name__ == "__main__":
    main()
