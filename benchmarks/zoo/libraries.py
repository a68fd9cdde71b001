"""Which libraries are installed, and what they need before they can be used here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata

from benchmarks.torchvision_operators import define_missing_operators, replace_missing_operators

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
        define_missing_operators()
        for module in (library, *_PARTS.get(library, ())):
            importlib.import_module(module)
        if library == "torchvision":
            replace_missing_operators()
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
