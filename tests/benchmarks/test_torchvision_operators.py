"""Stand-ins for torchvision's operators give what the definition says; torchvision itself is not needed."""

import torch

from benchmarks.torchvision_operators import nms


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_nms_keeps_the_best_of_overlapping_boxes():
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=random) * 10
    boxes = torch.cat([corner, corner + 1 + 4 * torch.rand(60, 2, generator=random)], 1)
    scores = torch.rand(60, generator=random)
    expected = []
    for index in sorted(range(60), key=lambda i: -scores[i].item()):
        if all(overlap(boxes[index].tolist(), boxes[other].tolist()) <= 0.3 for other in expected):
            expected.append(index)
    assert 1 < len(expected) < 60
    assert nms(boxes, scores, 0.3).tolist() == expected


def test_nms_of_no_boxes():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)
