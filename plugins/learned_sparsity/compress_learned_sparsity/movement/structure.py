"""Which elements of which layer share a score, as `sparse_structure_by_scopes` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from compress_core import ConfigError
from compress_core.config.scopes import ScopedModule, ScopeFilter
from compress_core.contract.ledger import Ledger
from compress_core.errors import Problem
from compress_core.transforms.layers import WeightTensor
from compress_learned_sparsity.movement.config import SparseStructure

# Operators that multiply with a matrix of two dimensions.
LINEAR = ("linear", "multi_head_attention_forward")


@dataclass(frozen=True)
class Linear:
    """A linear layer with its structure.

    Attributes:
        weight: Name of its weight.
        bias: Name of its bias, or empty.
        block: Rows and columns of the stored weight that share a score.
        output_dim: The dimension of the weight that has the output channels.
    """

    weight: str
    bias: str
    block: tuple[int, int]
    output_dim: int

    @property
    def bias_block(self) -> tuple[int]:
        """Elements of the bias that share a score."""
        return (self.block[self.output_dim],)


def linear_layers(
    model: nn.Module,
    tensors: Iterable[WeightTensor],
    entries: Iterable[SparseStructure],
    path: str,
    ledger: Ledger,
    *,
    validate: bool,
) -> list[Linear]:
    """Returns the layers with their structures.

    Args:
        model: The model.
        tensors: Weights of linear layers.
        entries: The section's `sparse_structure_by_scopes`.
        path: Its path.
        ledger: Where is recorded what the entries match.
        validate: Whether an entry that matches nothing is an error.

    Raises:
        ConfigError: Two entries match a layer, an entry matches none, or blocks do not divide a weight.
    """
    chosen: dict[str, tuple[str, SparseStructure]] = {}
    tensors = list(tensors)
    for index, entry in enumerate(entries):
        at = f"{path}.{index}"
        for name in _matched(model, tensors, entry, f"{at}.target_scopes", ledger, validate):
            if name in chosen:
                raise ConfigError([Problem(at, f"matches '{name}', and so does {chosen[name][0]}; let one of them")])
            chosen[name] = at, entry
    return [_linear(model, tensor, *chosen.get(tensor.name, ("", None))) for tensor in tensors]


def _matched(
    model: nn.Module,
    tensors: list[WeightTensor],
    entry: SparseStructure,
    path: str,
    ledger: Ledger,
    validate: bool,
) -> list[str]:
    target = {f"{path}.{index}": scope for index, scope in enumerate(entry.target_scopes)}
    scopes = ScopeFilter(model, {}, [target])
    scopes.add({tensor.name: ScopedModule(tensor.name) for tensor in tensors if tensor.layer.parameters == ()})
    names = [name for tensor in tensors for name in (tensor.name, *tensor.module_names)]
    if validate:
        scopes.check(names, names)
    for scope_path, scope in scopes.entries():
        ledger.record(scope_path, scope, "matches these modules", scopes.matches(scope))
    if not target:
        raise ConfigError([Problem(path, "is empty, so nothing has this structure; name a layer, or remove the entry")])
    return [t.name for t in tensors if scopes.reason_to_skip((t.name, *t.module_names)) is None]


def _linear(model: nn.Module, tensor: WeightTensor, path: str, entry: SparseStructure | None) -> Linear:
    output_dim = tensor.layer.output_dim or 0
    shape = tuple(tensor.shape)
    outputs, inputs = shape[output_dim], shape[1 - output_dim]
    rows, columns = _factors(entry, outputs, inputs)
    if entry is not None and (outputs % rows or inputs % columns):
        raise ConfigError(
            [
                Problem(
                    f"{path}.sparse_factors",
                    f"blocks of {rows} x {columns} do not divide '{tensor.name}', which has {outputs} rows and "
                    f"{inputs} columns",
                )
            ]
        )
    block = (rows, columns) if output_dim == 0 else (columns, rows)
    return Linear(tensor.name, _bias(model, tensor.name, outputs), block, output_dim)


def _factors(entry: SparseStructure | None, outputs: int, inputs: int) -> tuple[int, int]:
    if entry is None or entry.mode == "fine":
        return 1, 1
    if entry.mode == "per_dim":
        return (1, inputs) if entry.axis == 0 else (outputs, 1)
    assert entry.sparse_factors is not None
    rows, columns = entry.sparse_factors
    return rows, columns


def _bias(model: nn.Module, weight: str, outputs: int) -> str:
    """Returns the name of the bias of the layer with a weight; empty if it has none that is trained with it."""
    layer, _, attribute = weight.rpartition(".")
    name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(attribute)
    own = dict(model.get_submodule(layer).named_parameters(recurse=False))
    bias = None if name is None else own.get(name)
    if bias is None or not bias.requires_grad or tuple(bias.shape) != (outputs,):
        return ""
    return f"{layer}.{name}" if layer else str(name)
