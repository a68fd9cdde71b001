"""Filter pruning together with the other algorithms: any listed order, one result; strip, shrink and export."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from compress_core import create_compressed_model
from tests.plugins.filter_pruning.pruning_helpers import evaluated, shapes
from tests.zoo import ZOO, trained_model

PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.5,
    "params": {"prune_first_conv": True, "prune_downsample_convs": True, "multiple_of": 1},
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 16}},
}
SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
QUANTIZATION = {
    "algorithm": "quantization",
    "initializer": {"range": {"num_init_samples": 16}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 8}},
}
SETS = {
    "pruning, quantization": (PRUNING, QUANTIZATION),
    "pruning, sparsity": (PRUNING, SPARSITY),
    "all three": (PRUNING, SPARSITY, QUANTIZATION),
}


def compressed(name, sections):
    (x,) = ZOO[name][1]()
    loader = [(x, torch.zeros(len(x)))] * 4
    sections = copy.deepcopy(list(sections))
    if name == "transformer":  # no batch norm
        for section in sections:
            section.get("initializer", {}).pop("batchnorm_adaptation", None)
    return create_compressed_model(trained_model(name), {"compression": sections}, init_loader=loader)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "transformer"])
@pytest.mark.parametrize("algorithms", list(SETS))
def test_any_order_gives_the_same_model(name, algorithms):
    (x,) = ZOO[name][1]()
    models = [compressed(name, order) for order in itertools.permutations(SETS[algorithms])]
    first = evaluated(models[0][1], x)
    for controller, model in models:
        assert torch.equal(evaluated(model, x), first)
        assert list(controller.algorithms) == list(models[0][0].algorithms)
        if name != "transformer":
            assert (
                controller.statistics().to_dict()["batchnorm_adaptation"]["samples"] == 16
            )  # once, with the larger number


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "transformer"])
@pytest.mark.parametrize("algorithms", list(SETS))
def test_strip_shrink_and_resume(name, algorithms):
    (x,) = ZOO[name][1]()
    controller, model = compressed(name, SETS[algorithms])
    expected = evaluated(model, x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(evaluated(controller.strip(), x), expected, rtol=0, atol=1e-5 * scale)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    expected = evaluated(model, x)
    controller.shrink(optimizer)
    torch.testing.assert_close(evaluated(model, x), expected, rtol=0, atol=1e-5 * scale)
    optimizer.zero_grad()
    model.train()(x).square().mean().backward()
    optimizer.step()
    state = json.loads(json.dumps(controller.get_compression_state()))
    sections = copy.deepcopy(list(SETS[algorithms]))
    resumed, twin = create_compressed_model(trained_model(name), {"compression": sections}, compression_state=state)
    twin.load_state_dict(model.state_dict())
    assert shapes(twin) == shapes(model)
    assert torch.equal(evaluated(twin, x), evaluated(model, x))
    assert resumed.pruning_level == controller.pruning_level


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_a_quantized_file_of_the_small_model(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    (x,) = ZOO[name][1]()
    controller, _ = compressed(name, SETS["all three"])
    report = controller.export_onnx(tmp_path / "small.onnx", x)
    assert report.worst().relative_mean < 0.02
    small = shapes(controller.strip())
    graph = onnx.load(tmp_path / "small.onnx").graph
    integers = [
        tuple(entry.dims)
        for entry in graph.initializer
        if entry.data_type == onnx.TensorProto.INT8 and len(entry.dims) > 1
    ]
    weights = [shape for key, shape in small.items() if len(shape) > 1]
    assert sorted(torch.Size(s).numel() for s in integers) == sorted(torch.Size(s).numel() for s in weights)


class ResidualThenDepthwise(nn.Module):
    """A depthwise convolution reads a residual sum, so its input has a scale for each channel."""

    def __init__(self, residuals, again):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(residuals))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Conv2d(16, 4, 1)
        self.again = again

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        y = self.depthwise(x)
        return self.head(x + y if self.again else y).mean((2, 3))


@pytest.mark.parametrize("residuals", [0, 1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_scales_of_channels_follow_across_quantizers_with_one_scale(residuals, again):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"multiple_of": 2, "prune_first_conv": True},
    }
    document = {"compression": [pruning, {"algorithm": "quantization"}]}
    controller, model = create_compressed_model(ResidualThenDepthwise(residuals, again), document, init_loader=[x])
    model.eval()
    stripped = controller.strip()
    assert stripped.depthwise.weight.shape == (8, 1, 3, 3)
    torch.testing.assert_close(stripped(x), model(x), rtol=1e-4, atol=1e-5)
