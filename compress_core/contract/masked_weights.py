"""`MaskingAlgorithm`: base class of algorithms that have a transform at each weight and count zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from compress_core.config import AlgorithmConfig
from compress_core.contract.algorithm import Algorithm, Plan
from compress_core.contract.context import Context
from compress_core.contract.footprint import Footprint
from compress_core.contract.hookspecs import hookimpl
from compress_core.contract.nncf_tensors import NncfTensor
from compress_core.contract.sparsity_statistics import LayerSparsity
from compress_core.contract.stages import Stage
from compress_core.contract.trained_weights import trained_weights
from compress_core.errors import ModelError, UsageError
from compress_core.transforms import get_weight_transform, raw_parameter
from compress_core.transforms.generated import of_transform

MASKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that can be masked by what they are worth; others do not have the operators for it."""


class MaskingAlgorithm(Algorithm):
    """Base class of algorithms of sparsity with a transform of its own, `key=self.name`, at each weight.

    A subclass implements `kept`. Its `compress_plan` may return `plan_masks`, and its `compress_commit` calls
    `remember` with the plan.

    Attributes:
        nncf_entries: Names of tensors that NNCF has at weights -> that of the transform's tensor which takes them; None
            for those that follow from others.
    """

    stage: ClassVar[Stage] = Stage.SPARSITY
    nncf_entries: ClassVar[Mapping[str, str | None]] = {"_binary_mask": "mask"}

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self._targets: tuple[str, ...] = ()
        self._skipped: Mapping[str, str] = {}

    def kept(self, name: str) -> torch.Tensor:
        """Returns which elements of a weight are not masked, boolean, of its shape.

        Args:
            name: Dotted name of a weight that has the transform.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement kept(name)")

    def plan_masks(self, model: nn.Module, context: Context, *, frozen: bool = True) -> Plan:
        """Returns the plan to mask every weight that the scopes allow.

        Args:
            model: The model.
            context: The context.
            frozen: Whether weights that are not trained (`requires_grad` is False) are masked as well; otherwise they
                are left dense, with a warning.

        Raises:
            ModelError: A weight has a dtype that cannot be masked.
            ConfigError: There is no such weight.
        """
        targets, skipped = context.weight_targets(model, self)
        if not frozen:
            targets = trained_weights(targets, skipped, self, context)
        for name in (target.name for target in targets):
            dtype = raw_parameter(model, name).dtype
            if dtype not in MASKED_DTYPES:
                raise ModelError(
                    f"the weight '{name}' has the dtype {dtype}; {self.name.replace('_', ' ')} ranks float16, "
                    "bfloat16, float32 and float64: convert the model, or name the layer in ignored_scopes"
                )
        return Plan(tuple(target.name for target in targets), skipped)

    def remember(self, plan: Plan) -> None:
        """Keeps the targets of a plan."""
        self._targets, self._skipped = plan.targets, plan.skipped

    @hookimpl
    def compress_effect(self, footprint: Footprint, at_end: bool) -> Footprint:
        """Counts what is masked now; a subclass that knows the end says so."""
        if at_end:
            return footprint.left_open(f"training decides which weights '{self.name}' masks", ("nonzero",))
        return self.with_masks(footprint)

    def with_masks(self, footprint: Footprint) -> Footprint:
        """Returns a footprint with the present masks."""
        masks = {name: self.kept(name) for name in self.present}
        zeros = {name: mask.numel() - int(torch.count_nonzero(mask)) for name, mask in masks.items()}
        return footprint.with_levels({name: zeros[name] / max(mask.numel(), 1) for name, mask in masks.items()})

    def take_nncf(self, tensors: Sequence[NncfTensor]) -> dict[str, tuple[str, torch.Tensor] | None]:
        """Takes what `nncf_entries` names, of weights that have the same shape; see `Algorithm.take_nncf`."""
        taken: dict[str, tuple[str, torch.Tensor] | None] = {}
        present = set(self.present)
        for tensor in tensors:
            name = f"{tensor.module}.weight"
            if tensor.name not in self.nncf_entries or name not in present:
                continue
            entry, shape = self.nncf_entries[tensor.name], raw_parameter(self.model, name).shape
            if entry is None:
                taken[tensor.key] = None
            elif tensor.value.shape == shape:
                own = getattr(get_weight_transform(self.model, name, self.name), entry)
                value = tensor.value != 0 if own.dtype == torch.bool else tensor.value
                taken[tensor.key] = (f"{tensor.module}.weight_transforms.weight.{self.name}.{entry}", value)
        return taken

    @property
    def present(self) -> tuple[str, ...]:
        """The targets that still have a transform of their own: the user may replace or remove layers, or share one."""
        found = {name: get_weight_transform(self.model, name, self.name) for name in self._targets}
        first = {id(transform): name for name, transform in reversed(found.items())}
        return tuple(name for name, own in found.items() if own is not None and first[id(own)] == name)

    @property
    def sparsity_level(self) -> float:
        """Measured share of the weights of sparsified layers that is masked."""
        zeros, total = self.counts()
        return zeros / total if total else 0.0

    current_sparsity_level = sparsity_level

    @property
    def sparsified_module_info(self) -> list[str]:
        """Dotted names of the weights that have a mask."""
        return list(self.present)

    def counts(self) -> tuple[int, int]:
        """Returns the number of masked elements, and of all elements of the weights that have a mask."""
        masks = [self.kept(name) for name in self.present]
        total = sum(mask.numel() for mask in masks)
        return total - sum(int(torch.count_nonzero(mask)) for mask in masks), total

    def targets_below(self, module_info: str) -> tuple[str, ...]:
        """Returns the sparsified weights of a layer, or the weight of this name.

        Raises:
            UsageError: There is none.
        """
        names = tuple(n for n in self.present if n == module_info or n.rpartition(".")[0] == module_info)
        if not names:
            raise UsageError(
                f"'{module_info}' is not sparsified; choose one of {', '.join(self.present[:5])}"
                + (", ..." if len(self.present) > 5 else "")
            )
        return names

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """Returns the fields of `SparsityStatistics`."""
        layers = []
        for name in self.present:
            mask, weight = self.kept(name), raw_parameter(model, name)
            zeros = weight.numel() - int(torch.count_nonzero(mask))
            layers.append(LayerSparsity(name, tuple(weight.shape), weight.numel(), zeros))
        return {
            "layers": tuple(layers),
            "model_parameters": sum(p.numel() for name, p in model.named_parameters() if not of_transform(name)),
            "model_weights": sum(layer.weights for layer in layers) + sum(_size(model, n) for n in self._skipped),
            "skipped": self._skipped,
        }


def _size(model: nn.Module, name: str) -> int:
    """Returns the number of elements of a weight, which may be computed by a parametrization."""
    module, _, attribute = name.rpartition(".")
    weight: torch.Tensor = getattr(model.get_submodule(module), attribute)
    return weight.numel()
