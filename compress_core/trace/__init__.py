"""Traces of models: the graph of a forward, at the level of function calls and of ATen operators."""

from compress_core.data.examples import Example
from compress_core.trace.graph import Call, ForwardTrace, Operator, Value
from compress_core.trace.tracer import Trace, TraceError, trace

__all__ = ["Call", "Example", "ForwardTrace", "Operator", "Trace", "TraceError", "Value", "trace"]
