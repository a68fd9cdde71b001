"""Methods of generated classes for activation transforms: a forward, and those that reach the transforms' container."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from compress_core.torch_internals import ASSIGN_ENTRY


def activation_methods(base: type[nn.Module], attribute: str, forward: Callable[..., Any]) -> dict[str, Any]:
    """Returns methods of a subclass of `base` whose instances hold a container of transforms in `attribute`.

    Args:
        base: The original class.
        attribute: Name of the attribute.
        forward: The forward to which transforms are added.
    """
    return {
        "forward": _forward(forward, attribute),
        "named_modules": _named_modules(base, attribute),
        "_save_to_state_dict": _save_to_state_dict(base, attribute),
        "_load_from_state_dict": _load_from_state_dict(base, attribute),
        "_apply": _apply(base, attribute),
        "apply": _apply_function(base, attribute),
        "train": _train(base, attribute),
    }


def _forward(original: Callable[..., Any], attribute: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[attribute].run(original, self, args, kwargs)

    return forward


# Methods of the user's class are called with the arguments that were given: they may have another signature.


def _named_modules(base: type[nn.Module], attribute: str) -> Callable[..., Any]:
    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        memo, prefix, remove_duplicate = _arguments_of_named_modules(*args, **kwargs)
        if remove_duplicate and memo is not None and self in memo:
            return
        seen: set[nn.Module] = set() if memo is None else memo
        for name, module in base.named_modules(self, *args, **kwargs):
            if remove_duplicate:
                seen.add(module)
            yield name, module
        container: nn.Module | None = self.__dict__.get(attribute)
        if container is not None:
            own_prefix = f"{prefix}.{attribute}" if prefix else attribute
            yield from container.named_modules(seen, own_prefix, remove_duplicate)

    return named_modules


def _arguments_of_named_modules(
    memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> tuple[set[nn.Module] | None, str, bool]:
    return memo, prefix, remove_duplicate


def _save_to_state_dict(base: type[nn.Module], attribute: str) -> Callable[..., None]:
    def _save_to_state_dict(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        self.__dict__[attribute].state_dict(
            destination=destination, prefix=f"{prefix}{attribute}.", keep_vars=keep_vars
        )

    return _save_to_state_dict


def _load_from_state_dict(base: type[nn.Module], attribute: str) -> Callable[..., None]:
    def _load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own_prefix = f"{prefix}{attribute}."
        # The container is not a child, so torch would report its entries as unexpected.
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(own_prefix)}
        lists = (missing_keys, unexpected_keys, error_msgs)
        base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)
        assign = {ASSIGN_ENTRY: local_metadata.get(ASSIGN_ENTRY, False)}
        _load_tree(self.__dict__[attribute], dict(own), own_prefix, assign, strict, *lists)
        state_dict.update(own)

    return _load_from_state_dict


def _load_tree(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    module._load_from_state_dict(state_dict, prefix, *args)
    for name, child in module._modules.items():
        if child is not None:
            child_prefix = f"{prefix}{name}."
            entries = {key: value for key, value in state_dict.items() if key.startswith(child_prefix)}
            _load_tree(child, entries, child_prefix, *args)


def _apply(base: type[nn.Module], attribute: str) -> Callable[..., nn.Module]:
    def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        if args[0] if args else kwargs.get("recurse", True):
            self.__dict__[attribute]._apply(fn)
        return base._apply(self, fn, *args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]

    return _apply


def _apply_function(base: type[nn.Module], attribute: str) -> Callable[..., nn.Module]:
    def apply(self: nn.Module, fn: Callable[[nn.Module], None], *args: Any, **kwargs: Any) -> nn.Module:
        self.__dict__[attribute].apply(fn)
        return base.apply(self, fn, *args, **kwargs)

    return apply


def _train(base: type[nn.Module], attribute: str) -> Callable[..., nn.Module]:
    def train(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        result = base.train(self, *args, **kwargs)
        self.__dict__[attribute].train(self.training)  # a user's method may keep a layer frozen
        return result

    return train
