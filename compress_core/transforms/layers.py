"""The layer classes that have weights, and the list of all weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from compress_core.errors import UsageError
from compress_core.transforms.generated import of_transform
from compress_core.transforms.weight import is_plain_parameter, parameter_places

ModuleType = TypeVar("ModuleType", bound=type[nn.Module])


@dataclass(frozen=True)
class WeightedLayer:
    """Properties of a layer class that compression needs.

    Attributes:
        parameters: Names of the weights; one that is None on an instance is skipped.
        output_dim: The dimension of the weights that has the output channels; None if there is no such dimension.
        operator: Name of the operator in NNCF's node names, e.g. `conv2d`.
        ignored_algorithms: Algorithms that skip layers of this class.
    """

    parameters: tuple[str, ...] = ("weight",)
    output_dim: int | None = 0
    operator: str = ""
    ignored_algorithms: frozenset[str] = frozenset()


def _recurrent_parameters(layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"weight_{kind}{layer}" for layer in layers for kind in ("ih", "hh", "hr"))


# Recurrent layers name their weights by depth and direction; names that an instance does not have are skipped.
_STACKED = _recurrent_parameters(f"_l{depth}{direction}" for depth in range(64) for direction in ("", "_reverse"))

_WEIGHTED_LAYERS: dict[type[nn.Module], WeightedLayer] = {
    nn.Conv1d: WeightedLayer(operator="conv1d"),
    nn.Conv2d: WeightedLayer(operator="conv2d"),
    nn.Conv3d: WeightedLayer(operator="conv3d"),
    nn.ConvTranspose1d: WeightedLayer(output_dim=1, operator="conv_transpose1d"),
    nn.ConvTranspose2d: WeightedLayer(output_dim=1, operator="conv_transpose2d"),
    nn.ConvTranspose3d: WeightedLayer(output_dim=1, operator="conv_transpose3d"),
    nn.Linear: WeightedLayer(operator="linear"),
    nn.Embedding: WeightedLayer(operator="embedding"),
    nn.EmbeddingBag: WeightedLayer(operator="embedding_bag"),
    nn.MultiheadAttention: WeightedLayer(
        parameters=("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        operator="multi_head_attention_forward",
    ),
    nn.RNNBase: WeightedLayer(parameters=_STACKED, operator="rnn"),
    nn.RNNCellBase: WeightedLayer(parameters=_recurrent_parameters([""]), operator="rnn_cell"),
}


def register_module(
    *parameter_names: str, ignored_algorithms: Iterable[str] = (), target_weight_dim_for_compression: int = 0
) -> Callable[[ModuleType], ModuleType]:
    """Class decorator that registers your own layer class as one that has weights.

    Subclasses of torch's own layers need no registration.

    Args:
        *parameter_names: Names of its weight parameters; `"weight"` when none is given.
        ignored_algorithms: Names of algorithms that must skip it, or one name.
        target_weight_dim_for_compression: The dimension of the weights that has the output channels.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        UsageError: An argument is of another type, such as the class itself: `@register_module` without parentheses.
    """
    ignored = frozenset([ignored_algorithms] if isinstance(ignored_algorithms, str) else ignored_algorithms)
    for name in (*parameter_names, *ignored):
        if not isinstance(name, str):
            raise UsageError(f"register_module(): names are text, got {name!r}; write @register_module() above a class")
    if isinstance(target_weight_dim_for_compression, bool) or not isinstance(target_weight_dim_for_compression, int):
        raise UsageError(
            "register_module(): target_weight_dim_for_compression must be the number of a dimension, got "
            f"{target_weight_dim_for_compression!r}"
        )

    def register(cls: ModuleType) -> ModuleType:
        _WEIGHTED_LAYERS[cls] = WeightedLayer(
            parameters=parameter_names or ("weight",),
            output_dim=target_weight_dim_for_compression,
            operator=cls.__name__.lower(),
            ignored_algorithms=ignored,
        )
        return cls

    return register


def weighted_layer(cls: type[nn.Module]) -> WeightedLayer | None:
    """Returns the properties of a layer class, or of its nearest known base class; None if it has no weights."""
    for base in cls.__mro__:
        if base in _WEIGHTED_LAYERS:
            return _WEIGHTED_LAYERS[base]
    return None


@dataclass(frozen=True)
class WeightTensor:
    """A weight of a model; a tensor that several layers share is a single `WeightTensor`.

    Attributes:
        name: Dotted name of the parameter in the first layer that has it, e.g. `layer1.0.conv1.weight`.
        module_names: Dotted names of all layers that have it.
        layer: Properties of the first layer's class.
        parameter: The stored parameter; None if the layer computes it by a hook or a parametrization.
        untouchable: Why no algorithm can transform it; empty if it can be transformed.
    """

    name: str
    module_names: tuple[str, ...]
    layer: WeightedLayer
    parameter: nn.Parameter | None
    untouchable: str = ""

    @property
    def shape(self) -> torch.Size:
        """Shape of the stored parameter."""
        assert self.parameter is not None
        return self.parameter.shape


def _untouchable(module: nn.Module) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return "its max_norm rewrites the weight in every forward"
    return ""


def weight_tensors(model: nn.Module, algorithm: str) -> list[WeightTensor]:
    """Returns the weights of all weighted layers of `model`, in the order of `named_modules`.

    Args:
        model: The model; it is not changed.
        algorithm: Name of the calling algorithm, to skip layers registered with `ignored_algorithms`.
    """
    places: Mapping[int, list[tuple[str, nn.Module, str]]] = parameter_places(model)
    tensors: list[WeightTensor] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        layer = weighted_layer(type(module))
        if layer is None or algorithm in layer.ignored_algorithms:
            continue
        for parameter_name in layer.parameters:
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            if is_plain_parameter(module, parameter_name):
                parameter = module._parameters[parameter_name]
                assert parameter is not None
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    owners = tuple(owner for owner, _, _ in places[id(parameter)])
                    tensors.append(WeightTensor(name, owners, layer, parameter, _untouchable(module)))
            elif parameter_name not in module._parameters and hasattr(module, parameter_name):
                tensors.append(WeightTensor(name, (module_name,), layer, None))
    return tensors


def own_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the parameters that may be weights of layers of a user's own, of which no class is known.

    These are the floating parameters of two or more dimensions that no weighted layer lists, in the order of
    `named_modules`. Only a trace tells which of them are weights.

    Args:
        model: The model; it is not changed.

    Returns:
        Dotted name -> dotted names of all modules that have the parameter.
    """
    known = {id(tensor.parameter) for tensor in weight_tensors(model, "")}
    found = {}
    for key, places in parameter_places(model).items():
        module_name, module, name = places[0]
        parameter = module._parameters[name]
        path = f"{module_name}.{name}" if module_name else name
        if parameter is None or key in known or not parameter.is_floating_point() or parameter.ndim < 2:
            continue
        if not _belongs_to_others(model, module_name):
            found[path] = tuple(dict.fromkeys(owner for owner, _, _ in places))
    return found


def _belongs_to_others(model: nn.Module, module_name: str) -> bool:
    """Returns whether a module holds parameters of transforms, or of a parametrized weight of a known layer."""
    if of_transform(module_name):
        return True
    owner, mark, parameter = f".{module_name}".rpartition(".parametrizations.")
    layer = weighted_layer(type(model.get_submodule(owner[1:]))) if mark else None
    return layer is not None and parameter in layer.parameters
