"""What the user wants the initializers of this package to leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from compress_core import Context
from compress_core.config.scopes import ScopeFilter


def own_scopes(path: str, scopes: Sequence[str]) -> dict[str, str]:
    """Returns config path -> scope, for the `ignored_scopes` of a section; the path of the whole config is empty."""
    prefix = f"{path}." if path else ""
    return {f"{prefix}ignored_scopes.{i}": scope for i, scope in enumerate(scopes)}


def check_scopes(model: nn.Module, own: Mapping[str, str]) -> None:
    """Raises a ConfigError for a scope that matches no layer with a parameter.

    Those of the whole config may be meant for what other algorithms change, such as the results of operators.

    Args:
        model: The model.
        own: What `own_scopes` returned.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ScopeFilter(model, own).check([*names, *(name.rpartition(".")[0] for name in names)])


def filter_of(model: nn.Module, context: Context, own: Mapping[str, str]) -> ScopeFilter:
    """Returns the filter of the config's scopes and of the initializer's own."""
    return ScopeFilter(model, {**own_scopes("", context.config.root.ignored_scopes), **own})
