"""The table of docs/howto/choose.md: which method for which goal, with figures from benchmarks/results."""

from __future__ import annotations

import statistics
from typing import Any

from compress_core.contract.statistics import Table

Results = dict[str, dict[str, Any]]


def decision_table(results: Results) -> Table:
    """Returns the table.

    Args:
        results: The contents of benchmarks/results by the name of the file.
    """
    faster = {
        n: r["faster"]["1 thread, CPU"]["8 bits"]["median"] for n, r in results["exported_latency"]["networks"].items()
    }
    sizes = [r["size_ratio"] for r in results["exported_latency"]["networks"].values()]
    file = results["exported_accuracy"]["results"]["resnet56"]["onnxruntime"]
    step = results["quantization_cost"]["models"]["resnet18"]["train"]["ours"]["median"]
    bits = results["mixed_precision"]["results"]["resnet56"]
    pruned = results["pruned_latency"]["results"]["resnet50"]
    tuned = next(
        row
        for row in results["reconstruction_tuning"]["rows"]
        if (row["ratio"], row["variant"], row["epochs"]) == (2.1, "chosen", 10)
    )
    adapted = results["bn_adaptation-resnet56"]["results"]["80 % sparsity"]["summary"]
    fp32 = results["reconstruction-resnet56"]["fp32"]

    def repaired(case: str, variant: str) -> str:
        return f"{_reconstructed(results, case, variant):.1f} %"

    rows = [
        (
            "a file that runs faster on CPUs, and is a quarter as large",
            "[quantization](../quantization.md) to 8 bits with the [`target_device`]"
            "(../quantization.md#choose-the-device-the-model-will-run-on) of the runtime",
            f"ONNX Runtime with VNNI: ResNet-50 {faster['resnet50']:.2f} times faster, MobileNetV2"
            f" {faster['mobilenet_v2']:.2f}; size {min(sizes):.2f} to {max(sizes):.2f}; ResNet-56 in the file"
            f" {file['file']:.1f} %, in FP32 {file['FP32']:.1f} %, without training",
        ),
        (
            "the same, but 8 bits cost too much accuracy",
            "train the quantized model: [the training loop](../quantization.md#the-training-loop)",
            f"a training step of ResNet-18 takes {step:.2f} times as long as a plain one",
        ),
        (
            "fewer than 8 bits for the weights",
            "[mixed precision](../mixed_precision.md), `sensitivity`; runtimes that compute with them are rare",
            f"ResNet-56, 4 bits on average, without training: {bits['4']['sensitivity']['accuracy']:.1f} %, 4 bits"
            f" everywhere {bits['4']['uniform']['accuracy']:.1f} %, FP32 {bits['FP32']:.1f} %",
        ),
        (
            "fewer operations, on any device and in any format",
            "[filter pruning](../filter_pruning.md) with [reconstruction](../reconstruction.md), then training",
            f"half of the channels: ResNet-50 {pruned['speed_up']['median']:.2f} times faster; ResNet-56 with 2.1 times"
            f" fewer operations: {repaired('2.1x fewer operations', 'chosen')} before training,"
            f" {tuned['accuracy']:.1f} % after 10 epochs, FP32 {fp32:.1f} %",
        ),
        (
            "many zeros in the weights: a smaller download, or a runtime that skips zeros",
            "[magnitude sparsity](../magnitude_sparsity.md) with `reconstruction` as importance; if you can train for"
            " long, [learned sparsity](../learned_sparsity.md)",
            f"ResNet-56, 90 % sparse, before training: {repaired('90 % sparse', 'chosen')}; with nothing repaired"
            f" {repaired('90 % sparse', 'none')}, FP32 {fp32:.1f} %",
        ),
        (
            "two zeros in each group of four, for GPUs that use it",
            "the example plugin `compress-nm-sparsity` with reconstruction",
            f"ResNet-56 before training: {repaired('2:4 sparse', 'both')}, with nothing repaired"
            f" {repaired('2:4 sparse', 'none')}",
        ),
        (
            "all of it at once",
            "one config with three sections: [the pipeline](../explanation/pipeline.md)",
            "ResNet-56 with 2.1 times fewer operations, 80 % of the rest zeros, 8 bits, before training:"
            f" {repaired('2.1x, 80 % sparse, 8 bits', 'chosen')}; with nothing repaired"
            f" {repaired('2.1x, 80 % sparse, 8 bits', 'none')}",
        ),
        (
            "no training at all, a few hundred images without labels",
            "[weight reconstruction](../reconstruction.md) and [batch-norm adaptation](../adaptation.md)"
            " with any of them",
            f"ResNet-56, 3-bit weights: {repaired('3-bit weights', 'both')}, with adaptation alone"
            f" {repaired('3-bit weights', 'adaptation')}, with nothing repaired {repaired('3-bit weights', 'none')}",
        ),
        (
            "no training, and only some 64 images",
            "[batch-norm adaptation](../adaptation.md), `paired`",
            f"ResNet-56, 80 % sparse: {adapted['paired 64']:.1f} %, without {adapted['none']:.1f} %",
        ),
        (
            "no data at all",
            "[data-free correction](../reconstruction.md#without-data)",
            f"ResNet-56, 80 % sparse: {repaired('80 % sparse', 'data-free')}, without"
            f" {repaired('80 % sparse', 'none')}",
        ),
    ]
    unbroken = [tuple(cell.replace(" %", "\u00a0%") for cell in row) for row in rows]  # no line begins with a %
    return Table("", ("you want", "use", "measured"), unbroken)


def _reconstructed(results: Results, case: str, variant: str) -> float:
    """Returns the accuracy in percent on the largest number of test images, 256 samples, mean over draws."""
    rows = [
        row
        for row in results["reconstruction-resnet56"]["rows"]
        if (row["case"], row["variant"]) == (case, variant) and row["samples"] in (256, 0, None)
    ]
    largest = max(row["images"] for row in rows)
    return statistics.fmean(row["accuracy"] for row in rows if row["images"] == largest)
