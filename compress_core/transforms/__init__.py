"""How a model is changed, and how every change is undone.

A weight transform is a small `torch.nn.Module` that maps a weight to the weight that the layer computes with. The
original parameter stays where it is, under its name; the transforms of one tensor form a chain, ordered by stage.
"""

from compress_core.transforms.mask import WeightMask, mask_weight
from compress_core.transforms.model_wide import bake_transforms, bypass_transforms, has_transforms
from compress_core.transforms.weight import (
    WeightTransformHandle,
    add_weight_transform,
    get_weight_transform,
    raw_parameter,
)

__all__ = [
    "WeightMask",
    "WeightTransformHandle",
    "add_weight_transform",
    "bake_transforms",
    "bypass_transforms",
    "get_weight_transform",
    "has_transforms",
    "mask_weight",
    "raw_parameter",
]
