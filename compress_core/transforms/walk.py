"""Walks through the modules of a model where their names are not asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, original_class


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that `named_modules` names, in the same order, three times as fast.

    torch's generators are nested as deep as the modules are, and each module passes through all of them. Adding a
    transform walks through the model, so that walks are most of what adding hundreds of them costs.
    """
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        cls: Any = type(module)
        if _names_its_own(cls):
            for _, inner in module.named_modules(seen):
                seen.add(inner)
                yield inner
            continue
        seen.add(module)
        yield module
        container = module.__dict__.get(ACTIVATIONS_ATTRIBUTE)
        if isinstance(container, nn.Module):
            waiting.append(container)
        if module._modules:
            waiting += reversed(list(module._modules.values()))


@functools.lru_cache(maxsize=1 << 12)
def _names_its_own(cls: Any) -> bool:
    """Returns whether a method of the user's decides which modules there are below one of this class."""
    return original_class(cls).named_modules is not nn.Module.named_modules
