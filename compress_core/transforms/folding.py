"""Folds weights that a hook or a parametrization computes (`weight_norm`, `spectral_norm`, `prune`) into plain ones."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compress_core.errors import ModelError
from compress_core.torch_internals import computing_hooks
from compress_core.transforms.model_wide import has_transforms
from compress_core.transforms.snapshot import ModelSnapshot

FOLD_REMEDY = "make it a plain weight with compress_core.fold_computed_weights(model)"


def fold_computed_weights(model: nn.Module) -> list[str]:
    """Makes every parameter that is computed in the forward a plain one, with the value that it has in eval mode.

    Compression stores and masks plain parameters. A weight under `torch.nn.utils.weight_norm`, `spectral_norm`,
    `prune` or `torch.nn.utils.parametrize` is computed from others in each forward; here it takes their place, so that
    the model computes the same, and is trained without the parametrization from now on. Give optimizers the new
    parameters.

    Args:
        model: The model; changed in place, or not at all if this raises.

    Returns:
        Dotted names of the parameters that are plain now.

    Raises:
        ModelError: The model is compressed, or a parametrization cannot be removed.
    """
    if has_transforms(model):
        raise ModelError("fold_computed_weights is for models that are not compressed yet; call it before that")
    snapshot = ModelSnapshot(model)
    folded: list[str] = []
    try:
        for module_name, module in list(model.named_modules()):
            folded += [f"{module_name}.{parameter}".lstrip(".") for parameter in _fold(module)]
    except Exception as error:
        snapshot.restore()
        raise ModelError(f"after {folded}: a parametrization cannot be removed: {error}") from error
    except BaseException:
        snapshot.restore()
        raise
    return folded


def _fold(module: nn.Module) -> list[str]:
    """Folds the parameters of one module, and returns their names."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()  # in training mode, spectral norm iterates
    folded = []
    try:
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                folded.append(name)
        for name, kind in computing_hooks(module):
            if issubclass(kind, WeightNorm):
                remove_weight_norm(module, name)
            elif issubclass(kind, SpectralNorm):
                remove_spectral_norm(module, name)
            else:
                prune.remove(module, name)  # type: ignore[no-untyped-call]
            folded.append(name)
    finally:
        for part, mode in modes:
            part.training = mode
    return folded
