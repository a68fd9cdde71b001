"""The report of an export: the file, its operators, and how well it agrees with torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from compress_core.export.zeros import WeightZeros, zeros_to_str


@dataclass(frozen=True)
class Agreement:
    """The difference between one output of the runtime and of the model in torch, on one batch.

    Attributes:
        output: Name of the output.
        batch_size: Number of samples in the batch; 0 if the model has no batch dimension.
        optimized: Whether the runtime's graph optimizations were on (fused integer kernels), or off.
        largest: Largest absolute difference.
        mean: Mean absolute difference.
        relative: `largest` in units of the largest absolute value of the output in torch.
        relative_mean: `mean` in units of the mean absolute value of the output in torch.
        steps: `largest` in steps of an 8-bit grid over the range of the output in torch.
        top1: Share of the samples with the same largest entry in the last dimension; None unless the output is a
            floating-point tensor of shape (samples, ..., 2 or more).
        sizes: The sizes that the user has named in `dynamic_shapes`, in words.
    """

    output: str
    batch_size: int
    optimized: bool
    largest: float
    mean: float
    relative: float
    relative_mean: float
    steps: float
    top1: float | None = None
    sizes: str = ""


@dataclass(frozen=True)
class Work:
    """A layer that multiplies matrices, and how the runtime computes it.

    Attributes:
        place: Name of the module that it was exported from, or of the file's node.
        operator: The file's operator.
        macs: Its multiplications on the batch that was compared; None if they are not known.
        is_quantized: Whether an input or the weight is quantized in the file.
        is_integer: Whether the runtime multiplies integers.
        kernel: The runtime's name of what it executed; empty if it does not say.
        reason: Why it does not multiply integers.
    """

    place: str
    operator: str
    macs: int | None
    is_quantized: bool
    is_integer: bool
    kernel: str = ""
    reason: str = ""


@dataclass(frozen=True)
class LayerAgreement:
    """The difference between runtime and torch at one quantizer of an activation.

    Attributes:
        place: Module and which of its tensors.
        steps: Largest distance of what the runtime computes from torch's own activations, in steps of the quantizer
            from the value that torch rounds: up to 0.5 is rounding. Infinite if the scale is another one.
        accumulated: Mean difference between the integers in torch and in the file that runs as a whole, in steps:
            what roundings further up and the error of this layer add up to. None if it was not measured.
    """

    place: str
    steps: float
    accumulated: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """Result of an export; also stored in the file, as JSON in `metadata_props["compress_core.export"]`.

    Attributes:
        path: The file; not stored in it.
        size: Its size in bytes, that of its weights included; not stored in it.
        opset: Version of the operator set.
        algorithms: The algorithms that compressed the model.
        tolerance: The tolerance requested; see `CompressionController.export_onnx`.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        operators: Operator -> number of nodes in the file.
        runtime: Name and version of the runtime that verified the file; empty if it was not verified.
        runtime_operators: Operator -> number of nodes after the runtime has optimized the graph.
        agreements: All comparisons of outputs.
        layers: The comparison at each quantizer, in the order of the file; empty unless the outputs differ by more than
            the tolerance, or `by_layer` asked for it.
        work: The layers that multiply matrices, and how the runtime computes them, from its own profile.
        notes: What the file does differently from the model: the one batch size that it takes, values that it holds
            as constants or leaves out because they are no tensors, the floating-point type it computes in.
        data_path: The file of the weights, if they have a file of their own; not stored in it.
        zeros: The zeros of each weight.
    """

    path: str = ""
    size: int = 0
    opset: int = 0
    algorithms: tuple[str, ...] = ()
    tolerance: float = 0.0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)
    runtime: str = ""
    runtime_operators: Mapping[str, int] = field(default_factory=dict)
    agreements: tuple[Agreement, ...] = ()
    layers: tuple[LayerAgreement, ...] = ()
    work: tuple[Work, ...] = ()
    notes: tuple[str, ...] = ()
    data_path: str = ""
    zeros: tuple[WeightZeros, ...] = ()

    def worst(self, *, optimized: bool = True) -> Agreement | None:
        """Returns the comparison with the largest `relative_mean`, or None if nothing was compared.

        Args:
            optimized: Whether to look at those with the runtime's optimizations; a runtime that was compared in one
                way only ignores it.
        """
        found = [agreement for agreement in self.agreements if agreement.optimized is optimized]
        found = found or list(self.agreements)
        return max(found, key=lambda agreement: agreement.relative_mean, default=None)

    @property
    def integer_share(self) -> float | None:
        """Share of the multiplications that the runtime computes in integers; None if they were not counted."""
        return integer_share(self.work)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able values."""
        return asdict(self)

    def to_json(self) -> str:
        """Returns the JSON text that is stored in the file."""
        values = self.to_dict()
        del values["path"], values["size"], values["data_path"]
        return json.dumps(values)

    def to_str(self) -> str:
        """Returns the report as readable tables."""
        files = f"{self.path} and {self.data_path}" if self.data_path else self.path
        head = f"{files}: {self.size / 1e6:.2f} MB, opset {self.opset}, {', '.join(self.algorithms) or 'plain'}"
        operators = [
            [name, self.operators.get(name, 0), self.runtime_operators.get(name, 0) if self.runtime else "-"]
            for name in sorted({*self.operators, *self.runtime_operators})
        ]
        head = "\n".join([head, *(f"this file {note}" for note in self.notes)])
        parts = [head, tabulate(operators, headers=["operator", "in the file", "in the runtime"], tablefmt="simple")]
        if self.zeros:
            parts.append(zeros_to_str(self.zeros))
        if not self.runtime:
            return "\n\n".join([*parts, "not compared with torch (verify=False)"])
        parts += [f"torch against {self.runtime}:", _agreements_table(self.agreements)]
        if self.layers:
            parts += ["at each quantizer, in steps of it:", _layers_table(self.layers)]
        if self.work:
            parts += _work_tables(self.work, self.integer_share)
        return "\n\n".join(parts)


def integer_share(work: Sequence[Work]) -> float | None:
    """Returns the share of the multiplications that a runtime computes in integers; None if none are counted."""
    macs = sum(entry.macs or 0 for entry in work)
    return sum(entry.macs or 0 for entry in work if entry.is_integer) / macs if macs else None


def _agreements_table(agreements: Sequence[Agreement]) -> str:
    rows = [
        [
            a.output,
            ", ".join(filter(None, (str(a.batch_size or ""), a.sizes))) or "-",
            "on" if a.optimized else "off",
            f"{a.relative:.2e}",
            f"{a.relative_mean:.2e}",
            f"{a.steps:.3g}",
            "-" if a.top1 is None else f"{a.top1:.1%}",
        ]
        for a in agreements
    ]
    headers = ["output", "batch", "optimized", "largest, relative", "mean, relative", "8-bit steps", "top-1"]
    return tabulate(rows, headers=headers)


def _layers_table(layers: Sequence[LayerAgreement]) -> str:
    rows = [
        [layer.place, f"{layer.steps:.3g}", "-" if layer.accumulated is None else f"{layer.accumulated:.3g}"]
        for layer in layers
    ]
    return tabulate(rows, headers=["quantizer", "largest, this layer alone", "mean, accumulated"])


def _work_tables(work: Sequence[Work], share: float | None) -> list[str]:
    macs = sum(entry.macs or 0 for entry in work)
    counted = f"{share:.1%} of {macs / 1e6:.4g} million multiplications" if share is not None else "multiplications"
    unknown = sum(entry.macs is None for entry in work)
    more = f" ({unknown} layers of unknown size left out)" if unknown else ""
    in_float = [entry for entry in work if not entry.is_integer]
    head = f"{counted}{more} run in integers, in {len(work) - len(in_float)} of {len(work)} layers"
    rows = [
        [
            entry.place,
            entry.operator,
            "-" if entry.macs is None or not macs else f"{entry.macs / macs:.1%}",
            entry.kernel or "-",
            entry.reason,
        ]
        for entry in sorted(in_float, key=lambda entry: -(entry.macs or 0))
    ]
    headers = ["in floating point", "operator", "share", "kernel", "because"]
    return [head, *([tabulate(rows, headers=headers)] if rows else [])]
