"""Which libraries are installed, and what they need before they can be used here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata

import torch

LIBRARIES = (
    "torchvision",
    "timm",
    "segmentation_models_pytorch",
    "pytorchcv",
    "ultralytics",
    "transformers",
    "diffusers",
    "monai",
)


def why_missing(library: str) -> str:
    """Returns why a library cannot be imported; empty if it can, and for `own`, which needs none."""
    if library == "own":
        return ""
    try:
        importlib.import_module(library)
        if library == "torchvision":
            _define_nms()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def versions() -> dict[str, str]:
    """Returns the versions of what is installed."""
    found = {}
    for library in (*LIBRARIES, "onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library.replace("_", "-"))
    return found


def preload() -> None:
    """Imports what takes long, so that forked processes have it."""
    for module in ("torch._dynamo", "torch.onnx", "onnxscript", "onnxruntime"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def _define_nms() -> None:
    """Gives detectors the suppression of overlapping boxes in Python, where torchvision comes without its operators."""
    ops, extension = importlib.import_module("torchvision.ops.boxes"), importlib.import_module("torchvision.extension")
    if not extension._has_ops():
        ops.nms = _nms
        importlib.import_module("torchvision.ops").nms = _nms


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Returns the indices of boxes that no better box overlaps by more than the threshold, best first."""
    order = scores.argsort(descending=True, stable=True).tolist()
    ratios = importlib.import_module("torchvision.ops.boxes").box_iou(boxes, boxes)
    kept: list[int] = []
    for index in order:
        if all(float(ratios[index, other]) <= iou_threshold for other in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)
