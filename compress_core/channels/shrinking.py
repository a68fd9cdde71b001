"""Slices tensors of a model in place: parameters, buffers and gradients, and updates the size attributes of layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn

from compress_core.channels.decisions import freeze_decisions, tensors_to_come
from compress_core.channels.following import transform_tensors
from compress_core.channels.groups import ChannelGroup
from compress_core.errors import StateError
from compress_core.saved import STRICT, Items, Positive, Whole, damaged, parsed
from compress_core.torch_internals import AnyConv, AnyConvTranspose, AnyNorm, has_gradient_hooks

# The indices along a dimension that stay, ascending.
Kept: TypeAlias = "list[int]"


class _SavedTensor(BaseModel):
    model_config = STRICT
    shape: Items[Whole]
    kept: dict[str, Items[Whole]]


class _SavedShrinkage(BaseModel):
    model_config = STRICT
    format: Annotated[int, Field(ge=1, le=1)]  # Literal[1] would take True
    tensors: dict[str, _SavedTensor]
    attributes: dict[str, dict[str, Positive]] = {}


@dataclass(frozen=True)
class Shrinkage:
    """Which indices of which tensors stay; JSON-able through `to_dict`.

    Attributes:
        sizes: Name of a parameter or buffer -> its shape before.
        kept: Name -> dimension -> indices that stay, ascending.
        attributes: Dotted name of a module -> name of an integer attribute -> its new value, such as the number of
            heads of attention.
    """

    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, Kept]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept)

    def to_dict(self) -> dict[str, Any]:
        """Returns the shrinkage as a JSON-able dict."""
        tensors = {
            name: {"shape": list(self.sizes[name]), "kept": {str(dim): list(indices) for dim, indices in dims.items()}}
            for name, dims in self.kept.items()
        }
        attributes = {module: dict(values) for module, values in self.attributes.items()}
        return {"format": 1, "tensors": tensors, **({"attributes": attributes} if attributes else {})}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], path: str = "plan") -> Shrinkage:
        """Restores a shrinkage from what `to_dict` returned.

        Args:
            saved: The dict.
            path: Where it is, for messages.

        Raises:
            StateError: `saved` was not returned by `to_dict`; the message names the path of the first wrong value.
        """
        found = parsed(_SavedShrinkage, saved, path)
        sizes = {name: tuple(entry.shape) for name, entry in found.tensors.items()}
        kept: dict[str, dict[int, Kept]] = {}
        for name, entry in found.tensors.items():
            if not entry.kept:
                raise damaged(
                    f"{path}.tensors.{name}.kept", "must name a dimension; tensors that stay whole are left out"
                )
            kept[name] = {}
            for key, indices in entry.kept.items():
                place = f"{path}.tensors.{name}.kept.{key}"
                if key not in map(str, range(len(entry.shape))):
                    raise damaged(place, f"'{name}' has the dimensions 0 to {len(entry.shape) - 1}")
                ascending = all(a < b for a, b in itertools.pairwise(indices))
                if not indices or not ascending or indices[-1] >= entry.shape[int(key)]:
                    raise damaged(place, f"must be ascending indices below {entry.shape[int(key)]}, at least one")
                kept[name][int(key)] = indices
        return cls(sizes, kept, found.attributes)

    def then(self, later: Shrinkage) -> Shrinkage:
        """Returns the composition: this shrinkage, followed by `later` on its result."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            for dim, indices in dims.items():
                before = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = list(indices) if before is None else [before[index] for index in indices]
        return Shrinkage({**later.sizes, **self.sizes}, kept, {**self.attributes, **later.attributes})

    def check(self, model: nn.Module, path: str = "") -> None:
        """Refuses a model whose tensors or attributes are not those that this shrinkage was made for.

        Tensors that freezing a decision over a whole weight will add (see `apply`) are not checked.

        Args:
            model: The model.
            path: Where the shrinkage was saved, for messages.

        Raises:
            StateError: A tensor is missing or has another shape, or an attribute is no larger integer.
        """
        self._check_attributes(model)
        tensors = dict([*model.named_buffers(), *model.named_parameters()])
        to_come = tensors_to_come(model, self.kept)
        for name, shape in self.sizes.items():
            if name.startswith(to_come):
                continue
            where = f"{path}.tensors.{name}.shape: " if path else ""
            if name not in tensors:
                raise StateError(f"{where}the plan does not fit this model: it has no tensor '{name}'")
            if tuple(tensors[name].shape) != shape:
                raise StateError(
                    f"{where}the plan does not fit this model: '{name}' has the shape {tuple(tensors[name].shape)}, "
                    f"expected {shape}. Build the model as it was before it was shrunk"
                )

    def _check_attributes(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, values in self.attributes.items():
            for attribute, value in values.items():
                before = vars(modules[name]).get(attribute) if name in modules else None
                # Without this, a plan could write over anything, such as `training` or `forward`.
                if type(before) is not int or not 0 < value <= before:
                    raise StateError(
                        f"the plan does not fit this model: attributes.{name}.{attribute} is to become {value}, and "
                        f"the module has {'no such integer' if type(before) is not int else before}. Build the model "
                        "as it was before it was shrunk"
                    )

    def within(self, names: Iterable[str]) -> Shrinkage:
        """Returns the part of this shrinkage for the tensors with these names, and all attributes of modules."""
        allowed = set(names)
        wanted = [name for name in self.kept if name in allowed]
        sizes, kept = {name: self.sizes[name] for name in wanted}, {name: self.kept[name] for name in wanted}
        return replace(self, sizes=sizes, kept=kept)

    def with_weight_transforms(self, model: nn.Module) -> Shrinkage:
        """Returns this shrinkage extended by the tensors of weight transforms, cut as each transform declares.

        Raises:
            ShrinkError: A transform does not declare how its tensors follow, or cannot be cut.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = transform_tensors(model, shapes, self.kept)
        sizes = {name: shape for name, (shape, _) in found.items()}
        kept = {name: dims for name, (_, dims) in found.items()}
        return replace(self, sizes={**self.sizes, **sizes}, kept={**self.kept, **kept})

    def slice(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the part of `tensor` that stays; it is the tensor `name` or has its shape, such as a momentum."""
        for dim, indices in self.kept[name].items():
            tensor = tensor.index_select(dim, torch.as_tensor(indices, device=tensor.device))
        return tensor

    def apply(self, model: nn.Module) -> None:
        """Slices the tensors of a model in place, with their gradients, and updates the layers' attributes.

        Parameters and buffers stay the same objects. Decisions over whole weights are frozen first.

        Raises:
            StateError: The shrinkage was made for another model. Nothing has been changed except that decisions may
                have been frozen.
            ShrinkError: A decision cannot be frozen.
        """
        self.check(model)
        if freeze_decisions(model, self.kept):
            self.check(model)
        tensors = dict([*model.named_buffers(), *model.named_parameters()])
        with torch.no_grad():
            for name in self.kept:
                self._slice_in_place(name, tensors[name])
        update_attributes(model, self)

    def _slice_in_place(self, name: str, tensor: torch.Tensor) -> None:
        gradient = tensor.grad if tensor.is_leaf else None
        memory_format = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
        smaller = self.slice(name, tensor.detach()).contiguous(memory_format=memory_format)
        tensor.grad = None
        _exchange(tensor, smaller)
        if gradient is not None:
            tensor.grad = self.slice(name, gradient)


def _exchange(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a tensor new values of another shape, while it stays the same Python object.

    An autograd graph that is still alive, such as that of the last loss, remembers the old shape of a parameter, and
    the next backward pass would fail on it. So the contents of a parameter are swapped with those of a new tensor,
    which no graph refers to.
    """
    if isinstance(tensor, nn.Parameter) and tensor.is_leaf and not has_gradient_hooks(tensor):
        fresh = nn.Parameter(values, tensor.requires_grad)
        fresh.__dict__.update(tensor.__dict__)
        try:
            torch.utils.swap_tensors(tensor, fresh)  # type: ignore[no-untyped-call]
        except RuntimeError:  # there is a weak reference to the tensor, or a view of it
            pass
        else:
            return
    tensor.data = values


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def shrinkage(
    model: nn.Module,
    groups: Mapping[int, tuple[ChannelGroup, Set[int]]] | Sequence[tuple[ChannelGroup, Set[int]]],
) -> Shrinkage:
    """Returns which indices of a model's tensors stay when channels are removed.

    Args:
        model: The model.
        groups: Groups with the indices of the channels to remove.
    """
    pairs = groups.values() if isinstance(groups, Mapping) else groups
    shapes = {name: tuple(t.shape) for name, t in [*model.named_buffers(), *model.named_parameters()]}
    gone: dict[str, dict[int, np.ndarray]] = {}
    for group, channels in pairs:
        removed = np.array(sorted(channels), np.int64)
        for member in group.members if channels else ():
            dims = gone.setdefault(member.parameter, {})
            before = dims.get(member.dim, np.zeros(len(member.channels), bool))
            dims[member.dim] = before | np.isin(member.channels, removed)
    kept: dict[str, dict[int, Kept]] = {}
    for name, indices in gone.items():
        shrunk = {dim: np.flatnonzero(~mask).tolist() for dim, mask in indices.items() if mask.any()}
        if shrunk:
            kept[name] = shrunk
    attributes: dict[str, dict[str, int]] = {}
    for group, channels in pairs:
        for module, name in group.attributes if channels else ():
            before = getattr(model.get_submodule(module), name)
            attributes.setdefault(module, {})[name] = before * (group.size - len(channels)) // group.size
    return Shrinkage({name: shapes[name] for name in kept}, kept, attributes)


# Attributes of layers.


def update_attributes(model: nn.Module, done: Shrinkage) -> None:
    """Updates attributes such as `out_channels` of the layers whose tensors have a new shape.

    Args:
        model: The model, after it has been shrunk.
        done: Which indices of its tensors stayed.
    """
    tensors = dict([*model.named_buffers(), *model.named_parameters()])
    ids = {id(tensors[name]) for name in done.kept}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(id(tensor) in ids for tensor in own if tensor is not None) and (update := _update_of(module)):
            update(module)
    for name, values in done.attributes.items():
        for attribute, value in values.items():
            setattr(model.get_submodule(name), attribute, value)


def keeps_sizes(module: nn.Module) -> bool:
    """Returns whether a layer is of a class whose size attributes `update_attributes` knows."""
    return _update_of(module) is not None


def _update_of(module: nn.Module) -> Callable[[Any], None] | None:
    named = _update_named if any(name in vars(module) for pair in _PAIRS for name in pair) else None
    return next((update for cls, update in _UPDATES.items() if isinstance(module, cls)), named)


def _shape(module: Any, *names: str) -> tuple[int, ...]:
    for name in names:
        tensor = module._parameters.get(name)
        tensor = module._buffers.get(name) if tensor is None else tensor
        if tensor is not None:
            return tuple(tensor.shape)
    return ()


def _update_conv(module: Any) -> None:
    shape = _shape(module, "weight")
    transposed = isinstance(module, AnyConvTranspose)
    whole, part = shape[:2]
    if module.groups > 1 and part == 1 and module.in_channels == module.groups:
        # With one input in each group, groups are removed as a whole.
        multiplier = 1 if transposed else module.out_channels // module.groups
        module.groups = whole // multiplier
    if transposed:
        module.in_channels, module.out_channels = whole, part * module.groups
    else:
        module.out_channels, module.in_channels = whole, part * module.groups


def _update_linear(module: Any) -> None:
    module.out_features, module.in_features = _shape(module, "weight")


def _update_norm(module: Any) -> None:
    (module.num_features,) = _shape(module, "weight", "running_mean")


def _update_group_norm(module: Any) -> None:
    (channels,) = _shape(module, "weight")
    # Groups go as a whole.
    module.num_groups = channels // (module.num_channels // module.num_groups)
    module.num_channels = channels


def _update_layer_norm(module: Any) -> None:
    module.normalized_shape = _shape(module, "weight")


def _update_embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = _shape(module, "weight")


def _update_prelu(module: Any) -> None:
    (module.num_parameters,) = _shape(module, "weight")


# What linear layers of libraries call the sizes of their weight, in the order of its dimensions; nx and nf are GPT-2's.
_PAIRS = (("nx", "nf"), ("out_features", "in_features"), ("out_channels", "in_channels"))


def _update_named(module: Any) -> None:
    """Updates the sizes of a layer by their usual names; the proof finds it if they mean something else."""
    shape = _shape(module, "weight")
    for names in _PAIRS if len(shape) == 2 else ():
        for name, size in zip(names, shape, strict=True):
            if type(vars(module).get(name)) is int:
                setattr(module, name, size)


_UPDATES: dict[type[nn.Module], Callable[[Any], None]] = {
    AnyConv: _update_conv,
    nn.Linear: _update_linear,
    AnyNorm: _update_norm,
    nn.GroupNorm: _update_group_norm,
    nn.LayerNorm: _update_layer_norm,
    nn.Embedding: _update_embedding,
    nn.EmbeddingBag: _update_embedding,
    nn.PReLU: _update_prelu,
}
