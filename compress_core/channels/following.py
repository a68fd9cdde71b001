"""Determines how the tensors of transforms are cut with their weights, as each transform declares; never from sizes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress_core.channels.decisions import TransformedWeight, freeze_chain, transformed_weights, undecided
from compress_core.channels.errors import ShrinkError
from compress_core.torch_internals import AnyConvTranspose
from compress_core.transforms import Transform, WeightTransform, activation_transforms

_WORDS = ("weight", "channels", "fixed")

# Dimension -> indices that stay, ascending.
Dims = Mapping[int, Sequence[int]]


def transform_tensors(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, Dims]
) -> dict[str, tuple[tuple[int, ...], dict[int, list[int]]]]:
    """Returns which indices of the tensors of weight transforms stay when their weights are cut.

    Decisions over whole weights count as frozen, as they will be when the weights are cut. The model is not changed.

    Args:
        model: The model.
        shapes: Name of a parameter -> its current shape.
        kept: Name -> dimension -> indices that stay.

    Returns:
        Name of a tensor -> its shape, and dimension -> indices that stay.

    Raises:
        ShrinkError: A transform does not declare how one of its tensors follows, or cannot be cut.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modules = {id(module): name for name, module in model.named_modules()}
    found: dict[str, tuple[tuple[int, ...], dict[int, list[int]]]] = {}
    weights = list(transformed_weights(model))
    _check_decisions_of_their_own(weights, kept)
    for weight in weights:
        gone = kept.get(weight.name, {})
        chain = weight.chain
        if gone and undecided(chain):
            chain = copy.deepcopy(chain)
            freeze_chain(chain, weight)
        for (key, transform), original in zip(chain.named_children(), weight.chain.children(), strict=True):
            following = _Following(weight.name, weight.module, weight.owner, key, transform)
            for name, tensor in _own_tensors(transform):
                dims = following.dims(name, tensor, shapes[weight.name], gone) if gone else {}
                full = names.get(id(tensor), f"{modules[id(original)]}.{name}")
                expected = found[full][1] if full in found else kept.get(full, dims)
                if dims != expected:
                    raise following.error(f"shares its tensor '{name}' with another weight, which loses other channels")
                found[full] = tuple(tensor.shape), dims
    return {name: entry for name, entry in found.items() if entry[1]}


def _check_decisions_of_their_own(weights: Sequence[TransformedWeight], kept: Mapping[str, Dims]) -> None:
    uses = Counter(id(transform) for weight in weights for transform in weight.chain.children())
    for weight in weights:
        for key in undecided(weight.chain) if weight.name in kept else ():
            if uses[id(weight.chain._modules[key])] > 1:
                raise ShrinkError(
                    f"the transform '{key}' of '{weight.name}' depends on the whole tensor and is a transform of "
                    "other weights as well, so there is no single decision to freeze; give each weight its own",
                    weight.module,
                )


@dataclass(frozen=True)
class _Following:
    """A transform of a weight that becomes smaller.

    Attributes:
        weight: Name of the weight.
        module: Name of the layer that owns it.
        owner: That layer.
        key: Name of the transform in the chain of the weight.
        transform: The transform.
    """

    weight: str
    module: str
    owner: nn.Module
    key: str
    transform: nn.Module

    def dims(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], gone: Dims) -> dict[int, list[int]]:
        """Returns the indices of a tensor of the transform that stay, by dimension."""
        if tensor.numel() <= 1:
            return {}
        found = self._declared(name, tensor, shape, gone)
        for dim, indices in found.items():
            size = tensor.shape[dim] if 0 <= dim < tensor.ndim else 0
            if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < size:
                raise self.error(
                    f"says by shrunk_dims that of its tensor '{name}', of shape {tuple(tensor.shape)}, the indices "
                    f"{indices} of dimension {dim} stay; they must be there, and ascend"
                )
        if found and not any(tensor is own for own in (*self.transform.parameters(), *self.transform.buffers())):
            raise self.error(f"has the tensor '{name}' as a plain attribute, which cannot follow; use register_buffer")
        return found

    def _declared(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], gone: Dims) -> dict[int, list[int]]:
        word = _word(self.transform, name)
        if word is None and isinstance(self.transform, WeightTransform):
            own = self.transform.shrunk_dims(name, tensor, shape, {dim: list(kept) for dim, kept in gone.items()})
            if own is not None:
                return {dim: list(indices) for dim, indices in own.items()}
        if word == "weight":
            return self._broadcast(name, tensor, shape, gone)
        if word == "channels":
            return self._by_channel(name, tensor, shape, gone)
        if word == "fixed":
            return {}
        raise self.error(_undeclared(self.transform, WeightTransform, name, tensor, word))

    def _broadcast(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], gone: Dims) -> dict[int, list[int]]:
        offset = len(shape) - tensor.ndim
        if offset < 0 or any(size not in (1, of) for size, of in zip(tensor.shape, shape[offset:], strict=True)):
            raise self._shape_error(name, tensor, "weight", f"does not broadcast against {shape}")
        return {
            dim - offset: list(indices)
            for dim, indices in gone.items()
            if dim >= offset and tensor.shape[dim - offset] > 1
        }

    def _by_channel(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], gone: Dims) -> dict[int, list[int]]:
        output = _output_dim(self.owner, shape)
        if output is None:
            raise self._shape_error(
                name, tensor, "channels", "no dimension of this weight alone has the output channels"
            )
        along = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(along) != 1 or tensor.shape[along[0]] != shape[output]:
            raise self._shape_error(name, tensor, "channels", f"the weight has {shape[output]} output channels")
        return {along[0]: list(gone[output])} if output in gone else {}

    def _shape_error(self, name: str, tensor: torch.Tensor, word: str, why: str) -> ShrinkError:
        return self.error(
            f"declares that its tensor '{name}', of shape {tuple(tensor.shape)}, follows as '{word}', but {why}; "
            "declare another word, or override shrunk_dims"
        )

    def error(self, what: str) -> ShrinkError:
        """Returns the error that names the transform and its weight."""
        cls = type(self.transform).__name__
        return ShrinkError(f"the transform '{self.key}' ({cls}) of '{self.weight}' {what}", self.module)


def _output_dim(owner: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Returns the dimension of a layer's weight with the output channels; None if they are spread over two."""
    if isinstance(owner, AnyConvTranspose) and len(shape) > 1:
        if owner.groups == 1:
            return 1
        return 0 if shape[1] == 1 and shape[0] == owner.groups else None
    return 1 if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) else 0


# Activation transforms: a trace finds their channels, and their declarations have to agree with it.


@dataclass(frozen=True)
class DeclaredTensor:
    """A tensor of more than one element in an activation transform, and its declaration in `follows`.

    Attributes:
        owner: The transform and its place, in words.
        module: Name of the module of the place.
        own_name: Name of the tensor in the transform.
        is_fixed: Whether the tensor must not be cut.
    """

    owner: str
    module: str
    own_name: str
    is_fixed: bool

    def check_found(self, dim: int) -> None:
        """Checks the declaration, after the trace has found channels along a dimension.

        Raises:
            ShrinkError: The transform declares that the tensor has no channels.
        """
        if self.is_fixed:
            raise ShrinkError(
                f"{self.owner} declares its tensor '{self.own_name}' as 'fixed', but dimension {dim} of it goes with "
                "channels that are removed; declare 'channels'",
                self.module,
            )


def declared_tensors(model: nn.Module) -> dict[str, DeclaredTensor]:
    """Returns the declarations of all activation transforms, by name of the tensor; tensors of one element need none.

    Raises:
        ShrinkError: A transform does not declare how one of its tensors follows.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    found: dict[str, DeclaredTensor] = {}
    for handle in activation_transforms(model):
        owner = f"the transform '{handle.key}' ({type(handle.transform).__name__}) of '{handle.place}'"
        for name, tensor in _own_tensors(handle.transform):
            if tensor.numel() <= 1:
                continue
            word = _word(handle.transform, name)
            if word not in _WORDS:
                problem = _undeclared(handle.transform, Transform, name, tensor, word)
                raise ShrinkError(f"{owner} {problem}", handle.place.module)
            if id(tensor) in names:
                found[names[id(tensor)]] = DeclaredTensor(owner, handle.place.module, name, word == "fixed")
            elif word != "fixed":
                raise ShrinkError(
                    f"{owner} has the tensor '{name}' as a plain attribute, which cannot follow; use register_buffer",
                    handle.place.module,
                )
    return found


# Shared by transforms of weights and of activations.


def _word(transform: nn.Module, name: str) -> str | None:
    follows = transform.follows if isinstance(transform, Transform) else None
    return None if follows is None else follows.get(name)


def _undeclared(transform: nn.Module, base: type[nn.Module], name: str, tensor: torch.Tensor, word: str | None) -> str:
    what = f"its tensor '{name}', of shape {tuple(tensor.shape)},"
    if word is not None:
        return f"declares that {what} follows as '{word}'; there are {', '.join(map(repr, _WORDS))}"
    kind = "WeightTransform" if base is WeightTransform else "ActivationTransform"
    derive = "" if isinstance(transform, Transform) else f"derive the class from compress_core.transforms.{kind} and "
    of_weights = "'weight' if it broadcasts against the weight, " if base is WeightTransform else ""
    other = ", or override shrunk_dims" if base is WeightTransform else ""
    return (
        f"does not say how {what} follows when channels are removed; {derive}declare follows = {{'{name}': ...}}: "
        f"{of_weights}'channels' if it has a value for each output channel, 'fixed' if it depends on no size{other}"
    )


def _own_tensors(transform: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from transform.named_parameters()
    yield from transform.named_buffers()
    for prefix, module in transform.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}" if prefix else name, value
