"""Transforms: reversible changes of a model's weights and activations.

A weight transform is a small `torch.nn.Module` that maps a weight to the weight that the layer computes with. The
original parameter stays in the layer under its name; the transforms of one tensor form a chain, ordered by stage.

An activation transform does the same to a tensor that a forward computes; places (`ModuleInput`, `ModuleOutput`,
`CallInput`, `CallOutput`) say which one.
"""

from compress_core.transforms.activation import (
    ActivationTransformHandle,
    activation_transforms,
    add_activation_transform,
    get_activation_transform,
    strip_activation_transforms,
)
from compress_core.transforms.activation_functions import ACTIVATION_FUNCTIONS, COMPUTABLE_ACTIVATIONS
from compress_core.transforms.base import (
    ActivationTransform,
    ProjectingTransform,
    Transform,
    WeightGrid,
    WeightTransform,
)
from compress_core.transforms.mask import WeightMask, mask_weight
from compress_core.transforms.model_wide import (
    TransformedWeight,
    bake_transforms,
    bypass_transforms,
    has_transforms,
    module_names,
    transformed_weights,
)
from compress_core.transforms.places import (
    ActivationPlace,
    CallInput,
    CallOutput,
    CallPattern,
    ModuleInput,
    ModuleOutput,
    place_from_dict,
)
from compress_core.transforms.scaled_gradient import scaled_gradient
from compress_core.transforms.weight import (
    WeightTransformHandle,
    add_weight_transform,
    get_weight_transform,
    raw_parameter,
    recompute_weights,
    transformed_weight,
)

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "COMPUTABLE_ACTIVATIONS",
    "ActivationPlace",
    "ActivationTransform",
    "ActivationTransformHandle",
    "CallInput",
    "CallOutput",
    "CallPattern",
    "ModuleInput",
    "ModuleOutput",
    "ProjectingTransform",
    "Transform",
    "TransformedWeight",
    "WeightGrid",
    "WeightMask",
    "WeightTransform",
    "WeightTransformHandle",
    "activation_transforms",
    "add_activation_transform",
    "add_weight_transform",
    "bake_transforms",
    "bypass_transforms",
    "get_activation_transform",
    "get_weight_transform",
    "has_transforms",
    "mask_weight",
    "module_names",
    "place_from_dict",
    "raw_parameter",
    "recompute_weights",
    "scaled_gradient",
    "strip_activation_transforms",
    "transformed_weight",
    "transformed_weights",
]
