"""Cleans an exported graph: what nothing reads, and what only the exporter's developers need."""

from __future__ import annotations

from typing import Any

from compress_core.export.onnx.program import quiet
from compress_core.transforms.generated import ACTIVATIONS_ATTRIBUTE

_LARGEST_DUPLICATE = 16384  # elements: zero points of many channels, not weights


def drop_what_is_unused(graph: Any) -> None:
    """Removes nodes that nothing reads, and duplicate initializers."""
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass  # noqa: PLC0415 - an extra

    RemoveUnusedNodesPass()(graph)
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.graph.initializers[name]
    with quiet():
        DeduplicateInitializersPass(_LARGEST_DUPLICATE)(graph)
    for name in list(graph.graph.initializers):
        # The internal location of transforms is of no interest to readers of the file.
        short = f".{name}".replace(f".{ACTIVATIONS_ATTRIBUTE}.", ".")[1:]
        if short not in graph.graph.initializers:
            graph.graph.initializers[name].name = short


def forget_the_machine(graph: Any) -> None:
    """Removes the exporter's metadata of each node: stack traces with paths. Metadata of later rewrites stays."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
    graph.producer_name, graph.doc_string = "compress-core", None
