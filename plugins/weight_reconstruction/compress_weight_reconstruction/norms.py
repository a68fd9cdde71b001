"""Batch norms that are corrected while the forwards pass them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from compress_core.batchnorm.estimators import PairedEstimator
from compress_core.config.scopes import ScopeFilter
from compress_core.data.forwards import writing
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms.user_hooks import is_in_hook


class PairedNorm:
    """Running statistics of one batch norm, by the estimator `paired` of batch-norm adaptation.

    Args:
        name: Its dotted name.
        layer: The batch norm of the compressed model, which is written to.
        reference: That of the uncompressed model, with the trained statistics.
    """

    def __init__(self, name: str, layer: AnyBatchNorm, reference: AnyBatchNorm) -> None:
        self._estimator = PairedEstimator(name, reference)
        self._estimator.layer = layer
        self._was_seen = False

    def observe(self, reference: torch.Tensor, compressed: torch.Tensor) -> None:
        """Adds the inputs of one call in both models."""
        if not compressed.numel():
            return
        self._was_seen = True
        self._estimator.in_reference = True
        self._estimator.observe(reference)
        self._estimator.in_reference = False
        self._estimator.observe(compressed)

    def write(self) -> None:
        """Writes the estimate from all that was seen so far."""
        if self._was_seen:
            with writing():
                self._estimator.write(*self._estimator.estimate())

    def check(self, path: str) -> None:
        """Raises DataError if the inputs were not finite."""
        if self._was_seen:
            self._estimator.finish(1, path)


def norms_of(
    model: nn.Module, reference: nn.Module, scopes: ScopeFilter, frozen: frozenset[str]
) -> dict[str, AnyBatchNorm]:
    """Returns the batch norms of a model that are corrected, by name.

    Args:
        model: The compressed model.
        reference: The uncompressed model.
        scopes: What the user wants left alone.
        frozen: Names of layers that the user has frozen.
    """
    others = dict(reference.named_modules())
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, AnyBatchNorm) or layer.running_mean is None or layer.running_var is None:
            continue
        other = others.get(name)
        is_pair = isinstance(other, AnyBatchNorm) and other.num_features == layer.num_features
        if is_pair and name not in frozen and layer.momentum != 0.0 and scopes.reason_to_skip([name]) is None:
            found[name] = layer
    return found


def call_at_norms(model: nn.Module, names: Iterable[str], reached: Callable[[str, torch.Tensor], None]) -> None:
    """Lets calls of batch norms be announced with their inputs; calls by hooks of the user are not the model's.

    Args:
        model: A model that is thrown away afterwards: the hooks stay.
        names: Names of the batch norms.
        reached: Called with the name and the input.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Our own hook is run by the frame that called us.
            if not is_in_hook(sys._getframe(1).f_back):
                reached(name, args[0] if args else kwargs["input"])

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True)


def scale_of(norm: AnyBatchNorm) -> torch.Tensor:
    """Returns by what a batch norm multiplies each channel."""
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()
