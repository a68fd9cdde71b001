"""The report of an export: the file, its operators, and how well it agrees with torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    notes: tuple[str, ...] = ()
    data_path: str = ""
    zeros: tuple[WeightZeros, ...] = ()

    def worst(self, *, optimized: bool = True) -> Agreement | None:
        """Returns the comparison with the largest `relative_mean`, or None if nothing was compared."""
        found = [agreement for agreement in self.agreements if agreement.optimized is optimized]
        return max(found, key=lambda agreement: agreement.relative_mean, default=None)

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
            for a in self.agreements
        ]
        headers = ["output", "batch", "optimized", "largest, relative", "mean, relative", "8-bit steps", "top-1"]
        return "\n\n".join([*parts, f"torch against {self.runtime}:", tabulate(rows, headers=headers)])
