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


# What these libraries import when it is first used: forked processes then have it.
_PARTS = {
    "torchvision": ("torchvision.models.detection", "torchvision.models.segmentation"),
    "ultralytics": ("ultralytics.nn.tasks",),
    "transformers": ("transformers.modeling_utils", "transformers.models.bert.modeling_bert"),
    "diffusers": ("diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl"),
    "monai": ("monai.networks.nets", "monai.losses"),
}


def why_missing(library: str) -> str:
    """Returns why a library cannot be imported; empty if it can, and for `own`, which needs none."""
    if library == "own":
        return ""
    try:
        for module in (library, *_PARTS.get(library, ())):
            importlib.import_module(module)
        if library == "torchvision":
            _replace_operators()
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


def _replace_operators() -> None:
    """Gives detectors operators in Python, where torchvision comes without its own."""
    boxes, extension, align = (
        importlib.import_module(f"torchvision.{name}") for name in ("ops.boxes", "extension", "ops.roi_align")
    )
    if not extension._has_ops():
        boxes.nms = importlib.import_module("torchvision.ops").nms = _nms
        align._roi_align = align._roi_align.__wrapped__  # not compiled, which takes minutes


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Returns the indices of boxes that no better box overlaps by more than the threshold, best first."""
    order = scores.argsort(descending=True, stable=True)
    box_iou = importlib.import_module("torchvision.ops.boxes").box_iou
    kept: list[torch.Tensor] = []
    while len(order):
        kept.append(order[0])
        overlaps = box_iou(boxes[order[:1]], boxes[order[1:]])[0]
        order = order[1:][~(overlaps > iou_threshold)]
    return torch.stack(kept) if kept else order
