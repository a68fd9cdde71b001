"""Detectors of torchvision and ultralytics, with the batches of their loaders."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entries import Case, Entry

_SMALL = {"min_size": 96, "max_size": 128}
_FEW = {
    **_SMALL,
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 10,
}
_TORCHVISION: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": _FEW,
    "retinanet_resnet50_fpn": _SMALL,
    "fcos_resnet50_fpn": _SMALL,
    "ssdlite320_mobilenet_v3_large": {},
}
_ULTRALYTICS = {
    "yolov8n.yaml": "detect",
    "yolo11n.yaml": "detect",
    "yolo26n.yaml": "detect",
    "yolov8n-seg.yaml": "segment",
    "yolov8n-pose.yaml": "pose",
    "yolov8n-obb.yaml": "obb",
    "yolo11n-cls.yaml": "classify",
}


def _torchvision(name: str, options: dict[str, Any]) -> Case:
    make = getattr(importlib.import_module("torchvision.models.detection"), name)
    model = make(**{"weights": None, "weights_backbone": None, "num_classes": 5, **options})

    def target() -> dict[str, torch.Tensor]:
        return {
            "boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]]),
            "labels": torch.tensor([1, 1]),
            "image_id": torch.tensor([1]),
        }

    def batch() -> Any:  # what collate_fn=lambda samples: tuple(zip(*samples)) gives
        return (torch.rand(3, 96, 112), torch.rand(3, 96, 112)), (target(), target())

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.stack(list(model(list(batch[0]), list(batch[1])).values())).sum()

    def outputs(model: nn.Module, batch: Any) -> Any:
        return model(list(batch[0]), list(batch[1])) if model.training else model(list(batch[0]))

    return Case(model, [batch(), batch()], loss, outputs)


def _ultralytics(name: str, task: str) -> Case:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    arguments = importlib.import_module("ultralytics.cfg").get_cfg()
    classes = {
        "detect": tasks.DetectionModel,
        "segment": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "obb": tasks.OBBModel,
        "classify": tasks.ClassificationModel,
    }
    model = classes[task](name, ch=3, nc=4, verbose=False)
    model.args = arguments
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def batch() -> dict[str, Any]:
        if task == "classify":
            return {"img": torch.rand(2, 3, 64, 64), "cls": torch.tensor([0, 3])}
        found = {
            "im_file": ("a.jpg", "b.jpg"),
            "img": torch.rand(2, 3, 64, 64),
            "cls": torch.tensor([[0.0], [1.0], [3.0]]),
            "bboxes": torch.tensor([[0.4, 0.4, 0.3, 0.4], [0.6, 0.5, 0.5, 0.5], [0.5, 0.5, 0.6, 0.4]]),
            "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        }
        if task == "segment":
            masks = torch.zeros(2, 16, 16)
            masks[:, 3:12, 3:12] = 1
            found["masks"] = masks
        if task == "pose":
            found["keypoints"] = torch.rand(3, 17, 3)
        if task == "obb":
            found["bboxes"] = torch.cat([found["bboxes"], torch.tensor([[0.1], [0.2], [0.3]])], 1)
        return found

    return Case(
        model, [batch(), batch()], lambda model, batch: model(batch)[0].sum(), lambda model, batch: model(batch["img"])
    )


def entries() -> Iterator[Entry]:
    """Yields the detectors."""
    for name, options in _TORCHVISION.items():
        yield Entry(name, "torchvision", "detection", lambda n=name, o=options: _torchvision(n, o))  # type: ignore[misc]
    for name, task in _ULTRALYTICS.items():
        kind = "image classifiers" if task == "classify" else "detection"
        yield Entry(name, "ultralytics", kind, lambda n=name, t=task: _ultralytics(n, t))  # type: ignore[misc]
