"""Exports for tests: tiny models, the file read back with onnx, and ONNX Runtime on it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

from compress_core import create_compressed_model
from tests.zoo import images


def create(model, loader=None, *, root=None, **section):
    """Returns the controller of a quantized model in eval mode."""
    document = {"compression": {"algorithm": "quantization", **section}, **(root or {})}
    return create_compressed_model(model.eval(), document, init_loader=[images(8)] if loader is None else loader)[0]


class Wired(nn.Module):
    """Layers, and a function (model, *inputs) that connects them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.wiring = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.wiring(self, *inputs)


def norm(channels, cls=nn.BatchNorm2d):
    """A batch norm as after training; the first channel is mirrored, the second one is dead."""
    module = cls(channels)
    with torch.no_grad():
        module.running_mean.uniform_(-0.5, 0.5)
        module.running_var.uniform_(0.5, 2)
        module.weight.uniform_(0.5, 1.5)
        module.weight[0] *= -1
        module.weight[1] = 0
        module.bias.uniform_(-0.5, 0.5)
    return module


class File:
    """An ONNX file, read with onnx alone."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.proto = onnx.load(path)
        self.graph = self.proto.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.metadata = {entry.key: entry.value for entry in self.proto.metadata_props}

    def nodes(self, *operators):
        return [node for node in self.graph.node if node.op_type in operators]

    def readers(self, name):
        return [node for node in self.graph.node if name in node.input]

    def count(self, operator):
        return len(self.nodes(operator))

    def dequantized(self, name):
        """(integers, scale, zero point) of a constant that a DequantizeLinear makes, or None."""
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.constants:
            return None
        return tuple(self.constants[entry] for entry in node.input)

    def weights(self):
        """The integers of all weights, in the order of the nodes that read them."""
        found = [self.dequantized(node.input[1]) for node in self.nodes("Conv", "ConvTranspose", "Gemm", "MatMul")]
        return [weight[0] for weight in found if weight is not None]

    def activations(self):
        """(scale, zero point) of all quantizers of activations."""
        return [tuple(self.constants[name] for name in node.input[1:]) for node in self.nodes("QuantizeLinear")]

    def floats(self):
        """Shapes of floating-point constants that are no scales."""
        scales = {name for node in self.nodes("QuantizeLinear", "DequantizeLinear") for name in node.input[1:2]}
        return {
            name: array.shape
            for name, array in self.constants.items()
            if array.dtype == np.float32 and array.size > 1 and name not in scales
        }

    @functools.cached_property
    def sessions(self):
        return {optimized: session(self.path, optimized=optimized) for optimized in (False, True)}

    def run(self, *inputs, optimized=False):
        active = self.sessions[optimized]
        feed = {entry.name: tensor.numpy() for entry, tensor in zip(active.get_inputs(), inputs, strict=True)}
        return active.run(None, feed)


def session(path, *, optimized):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
