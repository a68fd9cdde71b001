"""Generated subclasses: layers whose weight is computed on access.

A layer with a weight transform becomes an instance of a subclass of its own class in which `weight` is a property: the
parameter that is stored under that name, sent through the chain of transforms. `torch.nn.utils.parametrize` works
the same way, with two differences that matter here: the parameter keeps its name (so checkpoints, optimizers and
EMA copies do not notice), and the layer can be pickled, because pickling names the original class and rebuilds the
subclass.

Invariants:
    * `isinstance` against the original class holds, and `__name__`, `__qualname__` and `__module__` are the original's.
    * The subclass adds no state: everything is in `module._parameters` and in the child `weight_transforms`.
    * One subclass for each (class, set of names), so that two layers of a kind share guards under `torch.compile`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_core.errors import TransformError

# The child module of a transformed layer that holds the chains, one for each transformed parameter.
TRANSFORMS_ATTRIBUTE = "weight_transforms"

_generated: dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = {}


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that `module` had before any transform was added."""
    cls = type(module)
    base: type[nn.Module] = cls.__dict__.get("_compress_base_class", cls)
    return base


def transformed_class(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """Returns the subclass of `base` in which the parameters `names` are read through their transforms.

    Args:
        base: The layer's original class.
        names: Names of parameters; with an empty set the class itself is returned.
    """
    if not names:
        return base
    key = (base, names)
    if key not in _generated:
        _generated[key] = _generate(base, names)
    return _generated[key]


def _generate(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_compress_base_class": base,
        "_compress_names": tuple(sorted(names)),
    }
    for name in names:
        namespace[name] = _weight_property(name)
    if hasattr(base, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    if issubclass(base, nn.RNNBase):
        # Recurrent layers hand a cached list of parameters to their kernels and never read them by name.
        namespace["_flat_weights"] = property(_flat_weights, _set_flat_weights)
        # Computed weights are new objects at each read: torch would rebuild its cache before every forward.
        namespace["_weights_have_changed"] = lambda self: False
    try:
        return type(base.__name__, (base,), namespace)
    except Exception as error:
        raise TransformError(
            f"the layer class {base.__name__} cannot be subclassed ({error}), which weight transforms need; name the "
            "layer in ignored_scopes"
        ) from error


def _weight_property(name: str) -> property:
    def get(self: nn.Module) -> torch.Tensor | None:
        container = self._modules.get(TRANSFORMS_ATTRIBUTE)
        if name not in self._parameters:
            if container is None:  # a layer that is being constructed
                raise AttributeError(name)
            raise TransformError(
                f"the parameter '{name}' of a compressed {type(self).__name__} was taken away; apply parametrize, "
                "weight_norm or prune before compression, or to the model that controller.strip() returns"
            )
        raw = self._parameters[name]
        if raw is None or container is None or name not in container._modules:
            return raw
        try:
            return container._modules[name](raw)  # type: ignore[no-any-return, misc]
        except AttributeError as error:
            # An AttributeError leaving a property makes Python fall back to `nn.Module.__getattr__`, which would
            # return the untransformed parameter without a word.
            raise TransformError(f"a weight transform of '{name}' in {type(self).__name__} failed: {error}") from error

    return property(get)


def _flat_weights(self: nn.RNNBase) -> list[Any]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _set_flat_weights(self: nn.RNNBase, value: list[Any]) -> None:
    # What torch stores here are the weights it just read, computed ones; copies and pickles need the stored ones.
    self.__dict__["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]


def _rebuild(names: tuple[str, ...], make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Makes the module as its original class would, then gives it the subclass back (called by pickle and deepcopy)."""
    module = make(*args)
    object.__setattr__(module, "__class__", transformed_class(base_class(module), frozenset(names)))
    return module


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Lets the user's own __deepcopy__ copy the plain layer, and gives the copy its transforms."""
    cls: Any = type(self)
    plain = object.__new__(cls._compress_base_class)
    plain.__dict__.update(self.__dict__)
    modules = dict(self._modules)
    container = modules.pop(TRANSFORMS_ATTRIBUTE, None)
    plain.__dict__["_modules"] = modules
    twin: nn.Module = plain.__deepcopy__(memo)
    memo[id(self)] = twin
    if container is not None:
        twin._modules[TRANSFORMS_ATTRIBUTE] = copy.deepcopy(container, memo)
        object.__setattr__(twin, "__class__", transformed_class(base_class(twin), frozenset(cls._compress_names)))
    return twin


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    cls = type(self)
    base: type[nn.Module] = cls._compress_base_class  # type: ignore[attr-defined]
    # Attributes of the MRO below the generated class decide, so a user's own __reduce__ keeps working.
    reduced: Any = super(cls, self).__reduce_ex__(max(protocol, 2))
    make, args, *rest = reduced
    # The default is `copyreg.__newobj__(cls)`: pickle cannot find the generated class by name, only the original.
    args = tuple(base if argument is cls else argument for argument in args)
    names: tuple[str, ...] = cls._compress_names  # type: ignore[attr-defined]
    return (_rebuild, (names, make, args), *rest)
