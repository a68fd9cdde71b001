"""Generated subclasses: layers whose weight is computed on access, and modules whose activations are transformed.

A layer with a weight transform becomes an instance of a subclass of its own class in which `weight` is a property: it
returns the stored parameter of that name after the chain of transforms. `torch.nn.utils.parametrize` works the same
way, with two differences: here the parameter keeps its name (so checkpoints, optimizers and EMA copies are not
affected), and the layer can be pickled, because pickling stores the original class and rebuilds the subclass.

A module with activation transforms gets a `forward` that applies them. Their container is an attribute but not a child
module, because `nn.Sequential` and many user-defined forwards call all their children. Instead, all methods with which
a module reaches its children (names, state, moves, modes) are extended to the container.

Invariants:
    * `isinstance` against the original class holds, and `__name__`, `__qualname__` and `__module__` are the original's.
    * The subclass adds no state: everything is in `module._parameters`, in the child `weight_transforms` and in the
      attribute `activation_transforms`.
    * One subclass for each (class, set of names, whether it has activation transforms), so that two layers of a kind
      share guards under `torch.compile`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_core.errors import ModelError, TransformError
from compress_core.torch_internals import AnyBatchNorm, recurrent_overrides, replica_override
from compress_core.transforms.call_sites import run_quietly
from compress_core.transforms.computed import ComputedWeight, is_read_for_a_forward
from compress_core.transforms.generated_forward import activation_methods
from compress_core.transforms.recomputation import layer_forward
from compress_core.transforms.sharded import is_sharded, sharded_error

# The child module of a transformed layer that holds the chains, one for each transformed parameter.
TRANSFORMS_ATTRIBUTE = "weight_transforms"

# The attribute of a module that holds the chains of its activations.
ACTIVATIONS_ATTRIBUTE = "activation_transforms"

_generated: dict[tuple[type[nn.Module], frozenset[str], bool], type[nn.Module]] = {}


def of_transform(name: str) -> bool:
    """Returns whether the dotted name of a module or parameter is of a transform, whichever algorithm added it."""
    return not {TRANSFORMS_ATTRIBUTE, ACTIVATIONS_ATTRIBUTE}.isdisjoint(name.split("."))


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that `module` had before any transform was added."""
    return original_class(type(module))


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of the user's that a generated class is made from; any other class itself."""
    base: type[nn.Module] = cls.__dict__.get("_compress_base_class", cls)
    return base


def transformed_class(base: type[nn.Module], names: frozenset[str], activations: bool = False) -> type[nn.Module]:
    """Returns the subclass of `base` that applies transforms to the parameters `names` and, if asked, to activations.

    Args:
        base: The layer's original class.
        names: Names of parameters.
        activations: Whether the forward applies activation transforms. If False and `names` is empty, `base` itself is
            returned.
    """
    if not names and not activations:
        return base
    key = (base, names, activations)
    if key not in _generated:
        _generated[key] = _generate(base, names, activations)
    return _generated[key]


def update_class(module: nn.Module) -> None:
    """Sets the class of a module according to the transforms that it has.

    Raises:
        TransformError: The class of the module cannot be subclassed.
    """
    chains = module._modules.get(TRANSFORMS_ATTRIBUTE)
    names = frozenset() if chains is None else frozenset(chains._modules)
    set_class(module, transformed_class(base_class(module), names, ACTIVATIONS_ATTRIBUTE in module.__dict__))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes a module's class."""
    # Not by assignment: a module may have a __setattr__ of its own.
    object.__setattr__(module, "__class__", cls)


def _generate(base: type[nn.Module], names: frozenset[str], activations: bool) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_compress_base_class": base,
        "_compress_names": tuple(sorted(names)),
        "_compress_activations": activations,
        **replica_override(_refuse_replica),
    }
    forward = layer_forward(base) if names else None
    if forward is not None:
        namespace["forward"] = forward
    if activations:
        namespace.update(activation_methods(base, ACTIVATIONS_ATTRIBUTE, forward or base.forward))
    for name in names:
        namespace[name] = _weight_property(name)
    if hasattr(base, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    if issubclass(base, AnyBatchNorm):
        namespace["num_features"] = _features_property()
    if issubclass(base, nn.RNNBase):
        namespace.update(recurrent_overrides())
    try:
        return type(base.__name__, (base,), namespace)
    except Exception as error:
        raise TransformError(
            f"the layer class {base.__name__} cannot be subclassed ({error}), which transforms need; name the layer in "
            "ignored_scopes"
        ) from error


def _weight_property(name: str) -> property:
    def get(self: nn.Module) -> torch.Tensor | None:
        container = self._modules.get(TRANSFORMS_ATTRIBUTE)
        if name not in self._parameters:
            if container is None:  # the layer is still being constructed
                raise AttributeError(name)
            raise TransformError(
                f"the parameter '{name}' of a compressed {type(self).__name__} was removed; apply parametrize, "
                "weight_norm or prune before compression, or to the model that controller.strip() returns"
            )
        raw = self._parameters[name]
        if raw is None or container is None or name not in container._modules:
            return raw
        if type(raw) is not nn.Parameter and is_sharded(raw):
            raise sharded_error(name)
        chain: Any = container._modules[name]
        try:
            weight: torch.Tensor = run_quietly(chain, raw)
            if weight is raw or torch.compiler.is_compiling() or is_read_for_a_forward():
                return weight
            what = f"the weight '{name}' of a compressed {type(self).__name__}"
            return ComputedWeight.of(what, weight, raw, lambda stored: run_quietly(chain, stored))
        except AttributeError as error:
            # An AttributeError leaving a property makes Python fall back to `nn.Module.__getattr__`, which would
            # silently return the untransformed parameter.
            raise TransformError(f"a weight transform of '{name}' in {type(self).__name__} failed: {error}") from error

    return property(get)


def _refuse_replica(self: nn.Module) -> Any:
    raise ModelError(
        f"DataParallel copies the model to each GPU, and the copy of a compressed {type(self).__name__} would not be "
        "compressed; train with one process for each GPU: DistributedDataParallel and torchrun"
    )


def _features_property() -> property:
    """Returns what `SyncBatchNorm.convert_sync_batchnorm` reads first of a layer that it is about to replace."""
    converting = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]

    def get(self: nn.Module) -> Any:
        if sys._getframe(1).f_code is converting:
            raise ModelError(
                f"a compressed {type(self).__name__} cannot be converted to SyncBatchNorm: the new layer would not "
                "have its masks and quantizers. Convert the model before create_compressed_model: "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
            )
        try:
            return self.__dict__["num_features"]
        except KeyError:
            raise AttributeError("num_features") from None

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__["num_features"] = value

    return property(get, put)


def _rebuild(
    names: tuple[str, ...], make: Callable[..., nn.Module], args: tuple[Any, ...], activations: bool = False
) -> nn.Module:
    """Rebuilds the module with its original class, then sets the subclass; called by pickle and deepcopy."""
    module = make(*args)
    set_class(module, transformed_class(base_class(module), frozenset(names), activations))
    return module


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Lets the user's own __deepcopy__ copy the plain layer, and gives the copy its transforms."""
    cls: Any = type(self)
    plain = object.__new__(cls._compress_base_class)
    plain.__dict__.update(self.__dict__)
    modules = dict(self._modules)
    container = modules.pop(TRANSFORMS_ATTRIBUTE, None)
    plain.__dict__["_modules"] = modules
    activations = plain.__dict__.pop(ACTIVATIONS_ATTRIBUTE, None)
    twin: nn.Module = plain.__deepcopy__(memo)
    memo[id(self)] = twin
    if container is not None:
        twin._modules[TRANSFORMS_ATTRIBUTE] = copy.deepcopy(container, memo)
    if activations is not None:
        twin.__dict__[ACTIVATIONS_ATTRIBUTE] = copy.deepcopy(activations, memo)
    update_class(twin)
    return twin


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    cls: Any = type(self)
    base: type[nn.Module] = cls._compress_base_class
    # Uses the MRO after the generated class, so that a user's own __reduce__ keeps working.
    reduced: Any = super(cls, self).__reduce_ex__(max(protocol, 2))
    make, args, *rest = reduced
    # The default is `copyreg.__newobj__(cls)`: pickle cannot find the generated class by name, only the original.
    args = tuple(base if argument is cls else argument for argument in args)
    return (_rebuild, (cls._compress_names, make, args, cls._compress_activations), *rest)
