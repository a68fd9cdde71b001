"""Classifiers and segmentation networks of torchvision, timm, segmentation-models-pytorch and pytorchcv."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entries import Case, Entry, classifier, segmenter

_CNN, _TRANSFORMER = "image classifiers", "vision transformers"

# Name -> (kind, side of the input, keywords).
_TORCHVISION: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet18": (_CNN, 64, {}),
    "mobilenet_v2": (_CNN, 64, {}),
    "mobilenet_v3_small": (_CNN, 64, {}),
    "efficientnet_b0": (_CNN, 64, {}),
    "densenet121": (_CNN, 64, {}),
    "shufflenet_v2_x0_5": (_CNN, 64, {}),
    "squeezenet1_1": (_CNN, 64, {}),
    "mnasnet0_5": (_CNN, 64, {}),
    "regnet_y_400mf": (_CNN, 64, {}),
    "googlenet": (_CNN, 96, {"init_weights": False}),
    "inception_v3": (_CNN, 299, {"init_weights": False}),
    "convnext_tiny": (_CNN, 64, {}),
    "swin_t": (_TRANSFORMER, 64, {}),
}
_TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mobilenetv4_conv_small": (_CNN, 64, {}),
    "convnext_atto": (_CNN, 64, {}),
    "ghostnet_050": (_CNN, 64, {}),
    "repvgg_a0": (_CNN, 64, {}),
    "res2net50_26w_4s": (_CNN, 64, {}),
    "tf_efficientnet_lite0": (_CNN, 64, {}),
    "nf_resnet26": (_CNN, 64, {}),
    "resnest14d": (_CNN, 64, {}),
    "fastvit_t8": (_TRANSFORMER, 64, {}),
    "levit_128s": (_TRANSFORMER, 224, {}),
    "efficientvit_b0": (_TRANSFORMER, 64, {}),
    "mobilevitv2_050": (_TRANSFORMER, 64, {}),
    "poolformerv2_s12": (_TRANSFORMER, 64, {}),
    "vit_tiny_patch16_224": (_TRANSFORMER, 64, {"img_size": 64}),
    "deit_tiny_distilled_patch16_224": (_TRANSFORMER, 64, {"img_size": 64}),
    "eva02_tiny_patch14_224": (_TRANSFORMER, 56, {"img_size": 56}),
}
_PYTORCHCV = ("preresnet20_cifar10", "seresnet20_cifar10", "diaresnet20_cifar10")
_SMP = {
    "Unet": {"encoder_name": "resnet18"},
    "FPN": {"encoder_name": "mobilenet_v2"},
    "DeepLabV3Plus": {"encoder_name": "timm-mobilenetv3_small_100"},
    "Segformer": {"encoder_name": "mit_b0"},
}
_SEGMENTATION = {
    "fcn_resnet50": {"aux_loss": True},
    "deeplabv3_mobilenet_v3_large": {"aux_loss": True},
    "lraspp_mobilenet_v3_large": {},
}


def _torchvision(name: str, size: int, options: dict[str, Any]) -> Case:
    models = importlib.import_module("torchvision.models")
    return classifier(models.get_model(name, weights=None, num_classes=10, **options), (3, size, size))


def _vision_transformer() -> Case:
    make = importlib.import_module("torchvision.models").VisionTransformer
    return classifier(make(64, 16, 2, 4, 64, 128, num_classes=10), (3, 64, 64))


def _video() -> Case:
    model = importlib.import_module("torchvision.models.video").r3d_18(weights=None, num_classes=10)
    return classifier(model, (3, 4, 32, 32))


def _torchvision_segmentation(name: str, options: dict[str, Any]) -> Case:
    make = getattr(importlib.import_module("torchvision.models.segmentation"), name)
    return segmenter(make(weights=None, weights_backbone=None, num_classes=4, **options))


def _timm(name: str, size: int, options: dict[str, Any]) -> Case:
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)
    return classifier(model, (3, size, size))


def _smp(name: str, options: dict[str, Any]) -> Case:
    make = getattr(importlib.import_module("segmentation_models_pytorch"), name)
    return segmenter(make(encoder_weights=None, classes=4, **options))


def _pytorchcv(name: str) -> Case:
    provider = importlib.import_module("pytorchcv.model_provider")
    return classifier(provider.get_model(name, pretrained=False), (3, 32, 32))


def _image_to_image() -> Case:
    """pix2pix: a generator trained against pictures, with a transposed convolution of one channel."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.2)]

    net = nn.Sequential(
        *block(1, 16),
        *block(16, 32),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1),
        nn.Tanh(),
    )
    batches = [(torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)) for _ in range(2)]
    return Case(net, batches, lambda model, batch: F.l1_loss(model(batch[0]), batch[1]))


def entries() -> Iterator[Entry]:
    """Yields the networks."""
    for name, (kind, size, options) in _TORCHVISION.items():
        yield Entry(name, "torchvision", kind, lambda n=name, s=size, o=options: _torchvision(n, s, o))  # type: ignore[misc]
    yield Entry("VisionTransformer", "torchvision", _TRANSFORMER, _vision_transformer)
    for name, options in _SEGMENTATION.items():
        yield Entry(name, "torchvision", "segmentation", lambda n=name, o=options: _torchvision_segmentation(n, o))  # type: ignore[misc]
    yield Entry("r3d_18", "torchvision", "medical and video", _video)
    for name, (kind, size, options) in _TIMM.items():
        yield Entry(name, "timm", kind, lambda n=name, s=size, o=options: _timm(n, s, o))  # type: ignore[misc]
    for name, options in _SMP.items():
        yield Entry(
            f"smp.{name}",
            "segmentation_models_pytorch",
            "segmentation",
            lambda n=name, o=options: _smp(n, o),  # type: ignore[misc]
        )
    for name in _PYTORCHCV:
        yield Entry(name, "pytorchcv", _CNN, lambda n=name: _pytorchcv(n))  # type: ignore[misc]
    yield Entry("pix2pix", "own", "segmentation", _image_to_image)
