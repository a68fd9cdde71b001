"""What the model computes in torch: the outputs with which the runtime's are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from compress_core.data.memory import refuse_out_of_memory
from compress_core.errors import ExportError
from compress_core.export.inputs import Inputs, Varying
from compress_core.torch_internals import tree_flatten_with_path


@dataclass(frozen=True)
class Reference:
    """A batch, and the outputs of the model in torch.

    Attributes:
        inputs: The batch.
        outputs: The output tensors, as a flat list.
        dropped: The outputs that are no tensors, as `path = value`.
    """

    inputs: Inputs
    outputs: tuple[torch.Tensor, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class References:
    """The batches of an export.

    Attributes:
        own: The batch of the example, for a file of one batch size.
        resized: Two batches of other sizes, for a file of any batch size; empty if the model does not take them.
        reason: Why `resized` is empty, if any batch size was wanted.
        named: For sizes that the user has named; None if there are none, or the model takes no others.
        fixed: What to say about those that the model does not take otherwise.
    """

    own: Reference
    resized: tuple[Reference, ...] = ()
    reason: str = ""
    named: NamedSizes | None = None
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedSizes:
    """Inputs of other sizes, of those that the user has named.

    Attributes:
        base: Inputs whose named sizes are 2 or more, because exporters treat a size of 1 as a constant.
        others: Names of the sizes that differ from `base`, with the inputs: each size, and all of them.
    """

    base: Reference
    others: tuple[tuple[tuple[str, ...], Reference], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names."""
        return tuple(entry.name for entry in self.base.inputs.varying)


def output_leaves(result: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all values in the result of a forward with their paths; also those in dataclasses and mappings.

    Args:
        result: The result, in any nesting.
        path: Path of the result.
    """
    for keys, leaf in tree_flatten_with_path(result)[0]:
        at = path + "".join(map(str, keys))
        if isinstance(leaf, Mapping):  # of a class that torch's trees do not know
            for key, item in leaf.items():
                yield from output_leaves(item, f"{at}[{key!r}]")
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for entry in fields(leaf):
                yield from output_leaves(getattr(leaf, entry.name, None), f"{at}.{entry.name}")
        else:
            yield at, leaf


def output_tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors in the result of a forward."""
    return tuple(leaf for _, leaf in output_leaves(result) if isinstance(leaf, torch.Tensor))


def return_only_tensors(model: nn.Module) -> None:
    """Makes a model return its output tensors as a tuple, because files hold nothing else."""

    def flatten(module: nn.Module, args: Any, result: Any) -> tuple[torch.Tensor, ...]:
        return output_tensors(result)

    model.register_forward_hook(flatten)


def references_of(model: nn.Module, inputs: Inputs, *, is_dynamic: bool) -> References:
    """Returns what a model in eval mode computes on an example, and on batches of other sizes made from it.

    Args:
        model: The model, on the CPU.
        inputs: The arguments of its forward.
        is_dynamic: Whether to look for the batch dimension, and to compare on other batch sizes.

    Raises:
        ExportError: The model returns no tensor, or a complex one.
    """
    own = _reference(model, inputs)
    if not own.outputs:
        found = ", ".join(own.dropped) or "nothing"
        raise ExportError(f"{type(model).__name__} returns no tensor ({found}), so there is nothing to export")
    if any(tensor.is_complex() for tensor in own.outputs):
        raise ExportError(
            f"{type(model).__name__} returns a complex tensor, and ONNX has no operators on these; return "
            "torch.view_as_real(...) of it"
        )
    named, fixed = _with_other_sizes(model, own) if inputs.varying else (None, ())
    references = References(own, named=named, fixed=fixed)
    if not is_dynamic or not inputs.batch_size:
        return references
    reason, usable = "", []
    inputs = inputs if named is None else named.base.inputs
    for size in inputs.batch_sizes():
        try:
            found_references = _resized(model, replace(inputs, batch_size=size))
        except Exception as error:
            refuse_out_of_memory(error)
            reason = reason or f"{type(error).__name__}: {_first_line(error)}"
            continue
        if _scales(found_references):
            return replace(references, resized=found_references)
        usable.append(found_references)
    if usable:
        return replace(references, resized=usable[0])
    return replace(references, reason=f"the model fails on others ({reason})")


def _with_other_sizes(model: nn.Module, own: Reference) -> tuple[NamedSizes | None, tuple[str, ...]]:
    """Returns inputs of other named sizes that a model takes, and what to say about those that it does not."""
    base, fixed = own.inputs, []
    for entry in own.inputs.varying:
        size = base.size_of(entry)
        found, reason = _first_taken(model, base, entry)
        if found is not None and size == 1:  # one for the export, and another to compare on
            grown = found.inputs
            found, reason = _first_taken(model, grown, entry)
            base = grown if found is not None else base
        if found is None:
            base = replace(base, varying=tuple(other for other in base.varying if other is not entry))
            fixed.append(f"takes {entry.name} of {size} only, because the model fails on others ({reason})")
    if not base.varying:
        return None, tuple(fixed)
    others: list[tuple[tuple[str, ...], Reference]] = []
    together = base
    for entry in base.varying:
        found, _ = _first_taken(model, base, entry)
        if found is not None:
            others.append(((entry.name,), found))
            together = together.with_size(entry, found.inputs.size_of(entry))
    if len(others) > 1:
        with contextlib.suppress(Exception):  # sizes that the model takes one by one
            others.append((tuple(entry.name for entry in base.varying), _reference(model, together)))
    first = replace(own, inputs=base) if base.label == own.inputs.label else _reference(model, base)
    return NamedSizes(first, tuple(others)), tuple(fixed)


def _first_taken(model: nn.Module, inputs: Inputs, entry: Varying) -> tuple[Reference | None, str]:
    """Returns inputs with another size that a model takes; None and why it fails if there are none."""
    reason = ""
    for size in entry.others(inputs.size_of(entry)):
        try:
            return _reference(model, inputs.with_size(entry, size)), ""
        except Exception as error:
            refuse_out_of_memory(error)
            reason = reason or f"{type(error).__name__}: {_first_line(error)}"
    return None, reason


def _reference(model: nn.Module, inputs: Inputs) -> Reference:
    copied = inputs.copied()
    with torch.no_grad():
        result = model(*copied.args, **copied.kwargs)
    leaves = list(output_leaves(result))
    return Reference(
        inputs,
        tuple(leaf.clone() for _, leaf in leaves if isinstance(leaf, torch.Tensor)),
        tuple(f"output{at} = {leaf!r:.60}" for at, leaf in leaves if not isinstance(leaf, torch.Tensor | None)),
    )


def _resized(model: nn.Module, inputs: Inputs) -> tuple[Reference, Reference]:
    first, others = inputs.sizes()
    exported = _reference(model, inputs.resized(first))
    failure: Exception | None = None
    for size in others:
        try:
            return exported, _reference(model, inputs.resized(size))
        except Exception as error:
            refuse_out_of_memory(error)
            failure = failure or error
    assert failure is not None
    raise failure


def _scales(pair: tuple[Reference, Reference]) -> bool:
    """Returns whether dimension 0 of an output changes with the batch size."""
    sizes = [reference.inputs.batch_size for reference in pair]
    return any(
        one.ndim > 0 and other.ndim > 0 and one.shape[0] > 0 and one.shape[0] * sizes[1] == other.shape[0] * sizes[0]
        for one, other in zip(*(reference.outputs for reference in pair), strict=False)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
