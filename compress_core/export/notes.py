"""What reports say in the same words for every format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress_core.export.references import Reference
from compress_core.export.report import Work
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE

_LARGE = 0.05  # of all multiplications
_MOST_NAMED = 3


def notes_on_values(reference: Reference, replaced: Sequence[str]) -> Iterator[str]:
    """Yields what a file does with floating-point types that it has not, and with what is no tensor.

    Args:
        reference: What was exported.
        replaced: Names of the types that became float32.
    """
    if replaced:
        kinds = " and ".join(replaced)
        yield f"computes in float32, inputs and outputs included, where the model computes in {kinds}"
    if constants := reference.inputs.constants():
        yield f"holds as constants what is no tensor: {', '.join(constants)}"
    if reference.dropped:
        yield f"leaves out what is no tensor: {', '.join(reference.dropped)}"


def notes_on_large_layers(work: Sequence[Work], runtime: str, remedy: str) -> tuple[str, ...]:
    """Returns what to say about large layers that are quantized and still computed in floating point.

    Args:
        work: The layers.
        runtime: Name of what computes them.
        remedy: What to do about it, to be appended.
    """
    total = sum(entry.macs or 0 for entry in work)
    slow = [e for e in work if e.is_quantized and not e.is_integer and (e.macs or 0) >= _LARGE * total > 0]
    if not slow:
        return ()
    slow.sort(key=lambda entry: -(entry.macs or 0))
    shown = "; ".join(
        f"'{entry.place}' ({(entry.macs or 0) / total:.0%} of the multiplications) because {entry.reason}"
        for entry in slow[:_MOST_NAMED]
    )
    more = f"; and {len(slow) - _MOST_NAMED} more" if len(slow) > _MOST_NAMED else ""
    return (f"has quantized layers that {runtime} computes in floating point: {shown}{more}{remedy}",)


def place_in_words(name: str, number: int | None) -> str:
    """Returns the place of a transform: the module, which of its tensors, and the number of the call.

    Of a transform that is inside of another one, it also says the key of that.
    """
    module, _, rest = name.partition(ACTIVATIONS_ATTRIBUTE)
    chain, *inside = rest.strip(".").split(".")
    words = [chain, *inside[: 1 if len(inside) > 1 else 0], *([] if number is None else [f"call {number}"])]
    return f"'{module.rstrip('.') or 'the model'}' ({', '.join(words)})"
