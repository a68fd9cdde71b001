"""Lets torchvision be imported and used where it comes without its C++ operators, as `pip install --no-deps` gives it.

That is the case beside a torch of another build (a CPU wheel). The operators that are used are written in Python here;
they are slow, but give what torchvision's own give. Benchmarks, the zoo and the tests of recipes call these functions.
"""

from __future__ import annotations

import importlib

import torch


def define_missing_operators() -> None:
    """Defines the operators without which torchvision cannot be imported; transformers imports it, too.

    `nms` computes: as an operator, so that a trace sees what it would see of torchvision's own.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
            torch.library.impl(f"torchvision::{operator}", "CPU", nms)


def replace_missing_operators() -> None:
    """Imports torchvision and gives detectors `nms` and `roi_align` without C++, if it has none of its own."""
    define_missing_operators()
    boxes, extension, align = (
        importlib.import_module(f"torchvision.{name}") for name in ("ops.boxes", "extension", "ops.roi_align")
    )
    if not extension._has_ops():
        boxes.nms = importlib.import_module("torchvision.ops").nms = torch.ops.torchvision.nms
        # Not compiled, which takes minutes.
        align._roi_align = getattr(align._roi_align, "__wrapped__", align._roi_align)


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Returns the indices of boxes that no better box overlaps by more than the threshold, best first.

    Args:
        boxes: Corners, float (N, 4).
        scores: Float (N,).
        iou_threshold: Largest intersection over union of two boxes that are kept.

    Returns:
        Int64, at most (N,).
    """
    order = scores.argsort(descending=True, stable=True)
    ordered = boxes[order].double()
    low, high = (pick(ordered[:, None, half], ordered[None, :, half]) for pick, half in _CORNERS)
    shared = (high - low).clamp(min=0).prod(-1)
    areas = (ordered[:, 2:] - ordered[:, :2]).prod(-1)
    overlaps = shared / (areas[:, None] + areas[None] - shared) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if kept[index]:
            kept[index + 1 :] &= ~overlaps[index, index + 1 :]
    return order[kept]


_CORNERS = ((torch.maximum, slice(0, 2)), (torch.minimum, slice(2, 4)))
