"""Walks through the modules of a model where their names are not asked for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE, base_class


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that `named_modules` names, in the same order, three times as fast.

    torch's generators are nested as deep as the modules are, and each module passes through all of them. Adding a
    transform walks through the model, so that walks are most of what adding hundreds of them costs.
    """
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        if base_class(module).named_modules is not nn.Module.named_modules:
            # The user's own method decides what there is below.
            for _, inner in module.named_modules(seen):
                seen.add(inner)
                yield inner
            continue
        seen.add(module)
        yield module
        below = [child for child in module._modules.values() if child is not None]
        container = module.__dict__.get(ACTIVATIONS_ATTRIBUTE)
        waiting += reversed([*below, container] if isinstance(container, nn.Module) else below)
