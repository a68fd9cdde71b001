"""What runtimes compute with integers in the exported files, read from the graphs that they optimize."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest

from tests.plugins.quantization.devices.device_nets import NETS, quantized

pytestmark = pytest.mark.usefixtures("fast_exporter")

# The number of layers whose weights ONNX Runtime gets quantized.
WEIGHTED = {
    **{"conv_relu": 3, "conv_silu": 2, "relu6": 2, "residual": 4, "downsample": 4, "depthwise": 3, "squeeze": 4},
    **{"concat": 3, "linear_head": 2, "attention": 5, "layernorm": 3, "upsample": 2, "bilinear": 2, "transposed": 1},
}
# An export takes a second, so only these run each time.
QUICK = {"squeeze", "concat", "attention"}
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
KEYS = ("layerType", "runtimePrecision")
INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def optimized(path, target):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(target).graph


@pytest.mark.parametrize("name", EACH)
def test_onnxruntime_computes_every_quantized_weight_with_integers(name, tmp_path):
    controller, _ = quantized(name, "onnxruntime-cpu")
    controller.export_onnx(tmp_path / "model.onnx")
    graph = optimized(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    constants = {tensor.name for tensor in graph.initializer}
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "NhwcFusedConv"):
            assert node.input[1] not in dequantized | constants, node
    kernels = Counter(node.op_type for node in graph.node)
    products = 2 if name == "attention" else 0
    assert sum(kernels[kind] for kind in INTEGER) == WEIGHTED[name] + products
    if name == "concat":
        assert kernels["QLinearConcat"] == 1
    if name == "residual":
        assert kernels["QLinearAdd"] == 1
    if name in ("squeeze", "conv_silu"):
        assert kernels["QLinearMul"] == kernels["QLinearSigmoid"] == 1


def runtime_kernels(path):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    found = []
    for operator in model.get_runtime_model().get_ordered_ops():
        info = operator.get_rt_info()
        found.append(tuple(info[key] if isinstance(info[key], str) else info[key].value for key in KEYS))
    return Counter(found)


@pytest.mark.parametrize("name", EACH)
def test_openvino_computes_every_quantized_weight_with_integers(name, tmp_path):
    pytest.importorskip("openvino")
    controller, _ = quantized(name, "openvino-cpu")
    controller.export_onnx(tmp_path / "model.onnx")
    kernels = runtime_kernels(tmp_path / "model.onnx")
    weighted = {kind: precision for kind, precision in kernels if kind in ("Convolution", "FullyConnected")}
    # Processors older than AVX-512 have no integer kernel for transposed convolutions in OpenVINO.
    assert set(weighted.values()) <= {"u8", "i8"}, kernels
    number = sum(kernels[kind, precision] for kind, precision in weighted.items())
    assert number == WEIGHTED[name]
    if name == "concat":
        assert kernels["Concatenation", "u8"] == 1
    if name == "upsample":
        assert kernels["Interpolate", "u8"] == 1
    # Processors with such instructions compute what stays in floating point in bfloat16.
    assert not any(kind == "MVN" and precision not in ("f32", "bf16") for kind, precision in kernels)
