"""Decides from one batch which weights can be reconstructed, in which order, and where the mean of the error goes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from compress_core.config.scopes import ScopeFilter
from compress_core.torch_internals import AnyBatchNorm
from compress_core.transforms import TransformedWeight, activation_transforms, transformed_weights
from compress_core.transforms.weight import parameter_places
from compress_weight_reconstruction.freedom import Allowed, allowed
from compress_weight_reconstruction.interception import Seen, Use
from compress_weight_reconstruction.layers import Bias, Layer
from compress_weight_reconstruction.norms import scale_of
from compress_weight_reconstruction.passes import Pair


@dataclass(frozen=True)
class Candidate:
    """A weight that has transforms, all of which say what they allow."""

    weight: TransformedWeight
    allowed: Allowed


def candidates(
    model: nn.Module, reference: nn.Module, scopes: ScopeFilter
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Returns the weights that may be reconstructed, and name -> reason for other transformed weights.

    Args:
        model: The compressed model.
        reference: The uncompressed model.
        scopes: What the user wants left alone.
    """
    places = parameter_places(model)
    trained = dict(reference.named_parameters(remove_duplicate=False))
    found, left = {}, {}
    weights = transformed_weights(model)
    uses = Counter(id(transform) for weight in weights for transform in weight.chain.children())
    uses.update(id(handle.transform) for handle in activation_transforms(model))
    for weight in weights:
        owners = places[id(weight.parameter)]
        names = [f"{owner}.{name}" if owner else name for owner, _, name in owners]
        if weight.parameter.ndim < 2:
            continue  # biases and scales
        reason = scopes.reason_to_skip([*names, *(owner for owner, _, _ in owners)])
        original = trained.get(names[0])
        open_ = allowed(weight)
        if reason is None and not weight.parameter.is_floating_point():
            reason = f"holds {weight.parameter.dtype}"
        elif reason is None and (original is None or original.shape != weight.parameter.shape):
            reason = "is not in the uncompressed model in this shape"
        if reason is None and isinstance(open_, str):
            reason = open_
        if reason is not None or isinstance(open_, str):
            left[names[0]] = reason or ""
        else:
            # A grid that others have as well is not this weight's to adjust.
            is_shared = open_.gridded is not None and uses[id(open_.gridded)] > 1
            found[names[0]] = Candidate(weight, open_.fixed() if is_shared else open_)
    return found, left


@dataclass(frozen=True)
class Survey:
    """What one batch has shown.

    Attributes:
        compressed: What the compressed model does with weights.
        reference: What the uncompressed model does with them.
        follows: Name of a weight -> the batch norm that takes the output of its product.
        order: Name of a weight or batch norm -> its position in the forward.
        held: What both forwards hold of one sample at each position, in bytes.
        shortcuts: Name of a weight -> numbers of the calls that make its shortcut in the compressed and in the
            uncompressed model, of weights that are used once.
    """

    compressed: Seen
    reference: Seen
    follows: Mapping[str, str]
    order: Mapping[str, int]
    held: Sequence[float]
    shortcuts: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, pairs: Sequence[Pair], visited: Sequence[str], samples: int) -> Survey:
        """Returns what the finished forwards of a pass have shown.

        Args:
            pairs: The forwards; the first tells how weights are used.
            visited: The keys of all stops, in order.
            samples: Number of samples in all.
        """
        first = pairs[0]
        order = {key: number for number, key in enumerate(dict.fromkeys(visited))}
        forwards = [forward for pair in pairs for forward in (pair.compressed, pair.reference)]
        held = [sum(forward.held.get(key, 0) for forward in forwards) / samples for key in order]
        found = cls(first.compressed.seen, first.reference.seen, first.reference.follows, order, held, {})
        theirs, normed = first.reference.shortcuts, first.reference.through_norm
        shortcuts = {
            name: (number, theirs[name])
            for name, number in first.compressed.shortcuts.items()
            if name in theirs
            and len(first.compressed.seen.calls[name]) == 1
            # A batch norm between that stays as it is is not known to the layer, so its scale is not either.
            and (name in normed) == bool(found.norm_of(name))
        }
        return dataclasses.replace(found, shortcuts=shortcuts)

    def why_not(self, name: str) -> str | None:
        """Returns why a weight cannot be reconstructed, or None."""
        for seen, which in ((self.compressed, "compressed"), (self.reference, "uncompressed")):
            if name in seen.others:
                return f"the {which} model uses it in {seen.others[name][0]}, which is no product with an input"
            if not seen.parts(name):
                return f"no product with it was seen in the {which} model"
        parts = self.compressed.parts(name)
        if set(parts) != set(self.reference.parts(name)):
            return "the two models do not use the same parts of it"
        if overlap([self.compressed.calls[part][0].rows for part in parts]):
            return "its products use parts of it that overlap"
        return next((reason for part in parts if (reason := self._why_not_part(part))), None)

    def _why_not_part(self, part: str) -> str | None:
        ours, theirs = _plain(self.compressed.calls[part]), _plain(self.reference.calls[part])
        if len(ours) != len(theirs) or set(ours) != set(theirs):
            return "the two models do not use it in the same way"
        return None if len(set(ours)) == 1 else "its products are of different kinds"

    def norm_of(self, part: str) -> str:
        """Returns the batch norm that alone takes the output of a weight's only product; empty if there is none."""
        is_alone = self.reference.readers.get(part, 0) == 1 and len(self.compressed.calls[part]) == 1
        return self.follows.get(part, "") if is_alone else ""

    def bias_of(self, part: str, model: nn.Module) -> Bias | None:
        """Returns the bias of a weight, if it belongs to its products alone and may be changed."""
        used = Counter((use.bias, use.rows) for calls in self.compressed.calls.values() for use in calls)
        ours, theirs = self.compressed.calls[part], self.reference.calls[part]
        bias, rows = ours[0].bias, ours[0].rows
        if not bias or {use.bias for use in (*ours, *theirs)} != {bias} or used[bias, rows] != len(ours):
            return None
        parameter = dict(model.named_parameters(remove_duplicate=False))[bias]
        if len(parameter_places(model)[id(parameter)]) > 1:
            return None
        support = torch.ones_like(parameter, dtype=torch.bool)
        for weight in transformed_weights(model):
            if weight.parameter is parameter:
                open_ = allowed(weight)
                if isinstance(open_, str) or open_.grid is not None:
                    return None
                support = open_.support
        index = slice(None) if rows is None else slice(*rows)
        return Bias(parameter.detach()[index], support[index])


def overlap(parts: list[tuple[int, int] | None]) -> bool:
    """Returns whether blocks of rows of one parameter overlap; None is the whole parameter."""
    if len(parts) == 1:
        return False
    ordered = sorted((0, sys.maxsize) if rows is None else rows for rows in parts)
    return any(left[1] > right[0] for left, right in itertools.pairwise(ordered))


def _plain(uses: list[Use]) -> list[tuple[str, int, bool]]:
    return [(use.kind, use.groups, use.columns_first) for use in uses]


def layer_of(part: str, candidate: Candidate, survey: Survey, model: nn.Module, reference: nn.Module) -> Layer:
    """Returns the layer to gather moments for.

    Args:
        part: Name of the weight, or of a part of it.
        candidate: The weight.
        survey: What was seen of it.
        model: The compressed model.
        reference: The uncompressed model.
    """
    norm = survey.norm_of(part)
    bias = None if norm else survey.bias_of(part, model)
    scale = scale_of(cast("AnyBatchNorm", reference.get_submodule(norm))) if norm else None
    use = survey.compressed.calls[part][0]
    parameter, open_ = candidate.weight.parameter, candidate.allowed
    if use.rows is None:
        return Layer(part, parameter, use, open_, bias, has_norm=bool(norm), scale=scale)
    rows = slice(*use.rows)
    return Layer(
        part, parameter.detach()[rows], use, open_.of_rows(rows, parameter), bias, has_norm=bool(norm), scale=scale
    )
