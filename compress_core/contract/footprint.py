"""`Footprint`: how large a model is, in parameters, operations and bytes, and what compression makes of it.

A footprint is counted on a model, or follows from one by what algorithms say of their effect (`compress_effect`): each
gets the footprint that those before have left, and returns its own. So effects compose, and nobody needs to know the
other algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from compress_core.channels.costs import count_operations
from compress_core.errors import PluginError
from compress_core.trace import Trace
from compress_core.transforms.chain import TransformContainer

Figure = Literal["parameters", "nonzero", "operations", "size"]
FIGURES: tuple[Figure, ...] = ("parameters", "nonzero", "operations", "size")


@dataclass(frozen=True)
class TensorFootprint:
    """What a parameter takes.

    Attributes:
        shape: Its shape.
        density: Share of its elements that are not zero, 0 to 1.
        is_average: Whether the density is that of several parameters together, and that of this one is not known.
        bits: Bits of precision of an element.
        stored_bits: Bits that an element takes in a file; 8 for integers of fewer bits, for example, if the format does
            not pack them.
        extra_bytes: What is stored beside it, such as scales.
    """

    shape: tuple[int, ...]
    density: float
    bits: int
    stored_bits: int
    extra_bytes: int = 0
    is_average: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in a file. Zeros count like other values, because files hold weights as they are."""
        return -(-self.elements * self.stored_bits // 8) + self.extra_bytes


@dataclass(frozen=True)
class Footprint:
    """How large a model is.

    Attributes:
        tensors: The parameters by name, each once.
        operations: Floating point operations of a forward of one sample: two for each multiply-accumulate of
            convolutions and matrix products (attention included), none for anything else. None if nothing was traced.
        open: A figure that cannot be given -> why, such as "decided from data at creation".
        notes: Sentences that belong to the figures.
        remarks: What the last algorithm does at each of its targets, in words.
        aliases: Further names of shared parameters -> the name in `tensors`.
    """

    tensors: Mapping[str, TensorFootprint]
    operations: int | None = None
    open: Mapping[Figure, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_model(cls, model: nn.Module, trace: Trace | None = None) -> Footprint:
        """Counts a model as it is, without what transforms hold, such as scales.

        Args:
            model: The model.
            trace: Its trace, for the operations.
        """
        first: dict[int, str] = {}
        tensors, aliases = {}, {}
        helpers = {id(p) for m in model.modules() if isinstance(m, TransformContainer) for p in m.parameters()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in helpers:
                continue
            if id(parameter) in first:
                aliases[name] = first[id(parameter)]
                continue
            first[id(parameter)] = name
            bits = 8 * parameter.dtype.itemsize
            tensors[name] = TensorFootprint(tuple(parameter.shape), _density(parameter), bits, bits)
        operations = None if trace is None else count_operations(trace.forwards[0])
        reasons: dict[Figure, str] = {} if trace is not None else {"operations": "there is no example input"}
        return cls(tensors, operations, reasons, aliases=aliases)

    # The figures.

    @property
    def parameters(self) -> int:
        """Number of parameters: elements, not tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def nonzero(self) -> int:
        """Number of parameters that are not zero."""
        return round(sum(tensor.elements * tensor.density for tensor in self.tensors.values()))

    @property
    def size(self) -> int:
        """Bytes that the parameters take in a file, with their scales; without the graph and without buffers.

        In ONNX the graph takes about 300 bytes for each node.
        """
        return sum(tensor.size for tensor in self.tensors.values())

    def figures(self) -> dict[Figure, int | None]:
        """Returns the figures by name; None for those that are open."""
        values: dict[Figure, int | None] = {
            "parameters": self.parameters,
            "nonzero": self.nonzero,
            "operations": self.operations,
            "size": self.size,
        }
        return {name: None if name in self.open else value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, what is open, and the notes; JSON-able."""
        figures: dict[str, Any] = {str(name): value for name, value in self.figures().items()}
        return figures | {"open": dict(self.open), "notes": list(self.notes)}

    # What algorithms do.

    def with_shapes(self, shapes: Mapping[str, Sequence[int]], operations: int | None = None) -> Footprint:
        """Returns the footprint after channels were removed.

        Args:
            shapes: The new shapes of parameters, by name.
            operations: The new number of operations; by default it stays.
        """
        found = self._changed(shapes, lambda tensor, shape: replace(tensor, shape=tuple(shape)))
        return replace(found, operations=found.operations if operations is None else operations)

    def with_levels(self, levels: Mapping[str, float], *, together: bool = False) -> Footprint:
        """Returns the footprint after a share of each of these parameters, 0 to 1, became zero.

        Zeros that are there already count: the share holds for all of them together.

        Args:
            levels: The share by name of the parameter.
            together: Whether the share is known only of all these parameters together.
        """
        return self._changed(
            levels,
            lambda tensor, level: replace(
                tensor, density=min(tensor.density, 1 - level), is_average=together or tensor.is_average
            ),
        )

    def with_bits(
        self, bits: Mapping[str, int], *, stored_bits: int | None = None, extra_bytes: Mapping[str, int] | None = None
    ) -> Footprint:
        """Returns the footprint after parameters got fewer bits.

        Args:
            bits: Bits of precision, by name of the parameter.
            stored_bits: Bits that an element takes in a file; by default as many.
            extra_bytes: Bytes that are stored beside a parameter, such as scales, by its name.
        """
        extra = {self.aliases.get(name, name): number for name, number in (extra_bytes or {}).items()}
        names = {self.aliases.get(name, name): number for name, number in bits.items()}
        changed = {
            name: replace(
                self.tensor(name),
                bits=number,
                stored_bits=number if stored_bits is None else stored_bits,
                extra_bytes=self.tensor(name).extra_bytes + extra.get(name, 0),
            )
            for name, number in names.items()
        }
        return replace(self, tensors={**self.tensors, **changed})

    def left_open(self, why: str, figures: Iterable[Figure] = FIGURES) -> Footprint:
        """Returns the footprint without figures that cannot be known now.

        Args:
            why: The reason, such as "decided from data at creation: ...".
            figures: Their names; those that are open already keep their reason.
        """
        return replace(self, open={**dict.fromkeys(figures, why), **self.open})

    def noted(self, sentence: str) -> Footprint:
        """Returns the footprint with a sentence about its figures."""
        return self if sentence in self.notes else replace(self, notes=(*self.notes, sentence))

    def remarked(self, remarks: Mapping[str, str]) -> Footprint:
        """Returns the footprint with words about targets of the algorithm, such as "8 bits, asymmetric".

        Without them, a plan tells what has changed of the parameter: shape, zeros, bits.
        """
        return replace(self, remarks={**self.remarks, **remarks})

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.tensors

    def tensor(self, name: str) -> TensorFootprint:
        """Returns what a parameter takes.

        Raises:
            PluginError: There is no parameter of this name.
        """
        found = self.tensors.get(self.aliases.get(name, name))
        if found is None:
            raise PluginError(f"the footprint of the model has no parameter '{name}'")
        return found

    def _changed(
        self, values: Mapping[str, Any], change: Callable[[TensorFootprint, Any], TensorFootprint]
    ) -> Footprint:
        # One change for each tensor, although a shared one may be named twice.
        own = {self.aliases.get(name, name): change(self.tensor(name), value) for name, value in values.items()}
        return replace(self, tensors={**self.tensors, **own})


def shape_in_words(shape: Sequence[int]) -> str:
    """Returns a shape as `64x3x7x7`; `scalar` for none."""
    return "x".join(map(str, shape)) or "scalar"


def _density(parameter: torch.Tensor) -> float:
    """Returns the share of elements that are not zero; 1 where it cannot be counted."""
    if parameter.is_meta or not parameter.numel():
        return 1.0
    try:
        return int(torch.count_nonzero(parameter.detach())) / parameter.numel()
    except (RuntimeError, NotImplementedError):  # sparse, or a dtype without this operator
        return 1.0
