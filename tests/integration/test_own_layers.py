"""Layers of a user's own: every weight of the model is compressed, or listed with the reason."""

import copy

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import create_compressed_model, register_default_init_args
from compress_core.transforms import raw_parameter


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.nf))


class Experts(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(2, inputs, outputs))
        self.down = nn.ParameterList([nn.Parameter(0.3 * torch.randn(inputs, outputs)) for _ in range(2)])

    def forward(self, x):
        hidden = torch.bmm(x.expand(2, *x.shape), self.up).relu()
        return sum(F.linear(h, w) for h, w in zip(hidden, self.down, strict=True))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.own, self.experts = nn.Linear(8, 16), Conv1D(16, 32), Experts(32, 16)
        self.head = nn.Parameter(0.3 * torch.randn(32, 4))
        self.position = nn.Parameter(0.1 * torch.randn(1, 8))

    def forward(self, x):
        return self.experts(self.own(self.first(x + self.position).relu()).relu()) @ self.head


INT8 = onnx.TensorProto.INT8
WEIGHTS = {"first.weight", "own.weight", "experts.up", "experts.down.0", "experts.down.1", "head"}
SECTIONS = {
    "quantization": {"initializer": {"range": {"num_init_samples": 16, "type": "min_max"}}},
    "magnitude_sparsity": {"sparsity_init": 0.5},
}


def data():
    torch.manual_seed(5)
    return [(torch.randn(4, 8), 0) for _ in range(4)]


def document(*algorithms, **more):
    return {"compression": [{"algorithm": name, **SECTIONS[name], **more} for name in algorithms]}


def created(model, *algorithms, **more):
    config = register_default_init_args(document(*algorithms, **more), data())
    return create_compressed_model(model.eval(), config)


def test_every_weight_is_sparsified_and_levels_are_those_of_the_model():
    torch.manual_seed(0)
    controller, model = created(Own(), "magnitude_sparsity")
    statistics = controller.statistics().magnitude_sparsity
    assert {layer.name for layer in statistics.layers} == WEIGHTS
    assert not statistics.skipped
    weights = [raw_parameter(model, name) for name in WEIGHTS]
    total, stripped = sum(weight.numel() for weight in weights), controller.strip()
    zeros = sum(int((stripped.get_parameter(name) == 0).sum()) for name in WEIGHTS)
    assert zeros == round(0.5 * total)
    assert statistics.weights_sparsity_level == zeros / total
    assert torch.equal(stripped(data()[0][0]), model(data()[0][0]))


def test_every_weight_is_quantized_along_the_channels_of_its_products():
    torch.manual_seed(0)
    plain = Own()
    controller, model = created(copy.deepcopy(plain), "quantization")
    shapes = {q.parameter: q.shape for q in controller.algorithms["quantization"]._planned if q.parameter}
    assert shapes == {
        "first.weight": (16, 1),
        "own.weight": (1, 32),
        "experts.up": (1, 1, 16),
        "experts.down.0": (32, 1),
        "experts.down.1": (32, 1),
        "head": (1, 4),
    }
    assert controller.statistics().quantization.shares()["weights"] == 1.0
    places = [str(p) for q in controller.algorithms["quantization"]._planned for p in q.places]
    assert not any("head" in place or "weight" in place for place in places)
    x = data()[0][0]
    assert (model(x) - plain(x)).norm() < 0.05 * plain(x).norm()
    assert torch.allclose(controller.strip()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("algorithms", [("quantization",), ("magnitude_sparsity", "quantization")])
def test_own_layers_train_compile_export_and_resume(algorithms, tmp_path):
    torch.manual_seed(0)
    plain = Own()
    controller, model = created(copy.deepcopy(plain), *algorithms)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x, _ in data():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(raw_parameter(model, name).grad.abs().sum() > 0 for name in WEIGHTS)
    x = data()[0][0]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    # A few activations are rounded the other way, which is 1.5 % of such small outputs; a wrong scale is 10 % and more.
    report = controller.export_onnx(tmp_path / "model.onnx", x, tolerance=0.1)
    assert report.worst(optimized=False).relative_mean < 0.02
    file = onnx.load(tmp_path / "model.onnx").graph
    integers = {entry.name.removesuffix(".integers") for entry in file.initializer if entry.data_type == INT8}
    assert integers >= WEIGHTS
    state, config = controller.get_compression_state(), document(*algorithms)
    _, resumed = create_compressed_model(copy.deepcopy(plain), config, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(x), model(x))


def test_weights_are_named_by_scopes():
    controller, _ = created(Own(), "magnitude_sparsity", ignored_scopes=["head", "experts"])
    statistics = controller.statistics().magnitude_sparsity
    assert {layer.name for layer in statistics.layers} == {"first.weight", "own.weight"}
    assert set(statistics.skipped) == WEIGHTS - {"first.weight", "own.weight"}
    assert statistics.weights_sparsity_level < statistics.sparsity_level
    controller, _ = created(Own(), "quantization", ignored_scopes=["head"])
    assert "head" in controller.statistics().quantization.skipped
    assert controller.statistics().quantization.shares()["weights"] == 5 / 6


class Hidden(nn.Module):
    """Parameters that no transform reaches, or of which a transform would not hold."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.listed = nn.Parameter(torch.randn(8, 8))
        self.everything = [self.listed]
        self.standardized = nn.Parameter(torch.randn(8, 8))
        self.elsewhere = nn.Parameter(torch.randn(8, 8))

    def forward(self, x, other=False):
        x = F.linear(self.plain(x), self.everything[0])
        x = F.linear(x, self.standardized - self.standardized.mean(1, keepdim=True))
        return x @ self.elsewhere if other else x


@pytest.mark.parametrize("algorithm", ["quantization", "magnitude_sparsity"])
def test_weights_that_cannot_be_compressed_are_listed(algorithm):
    controller, model = created(Hidden(), algorithm)
    statistics = getattr(controller.statistics(), algorithm)
    assert "does not read it as an attribute" in statistics.skipped["listed"]
    assert "computes a weight from it (sub)" in statistics.skipped["standardized"]
    assert statistics.skipped["elsewhere"] == "no example input reaches it"
    if algorithm == "quantization":
        assert statistics.shares()["weights"] == 0.25
    else:
        assert statistics.weights_sparsity_level == 0.5 / 4
    assert "standardized" in controller.statistics().to_str()
    assert "weight_transforms" not in dict(model.named_children())


def test_without_an_example_own_parameters_are_listed():
    controller, model = create_compressed_model(Own(), document("magnitude_sparsity"))
    statistics = controller.statistics().magnitude_sparsity
    assert {layer.name for layer in statistics.layers} == {"first.weight"}
    assert "whether it is a weight is not known" in statistics.skipped["own.weight"]
    assert statistics.weights_sparsity_level < 0.1
    assert type(model.own) is Conv1D


def test_tied_weights_of_own_layers_have_one_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.own = nn.Linear(8, 16, bias=False), Conv1D(8, 16)
            self.twin = Conv1D(8, 16)
            self.twin.weight = self.own.weight

        def forward(self, x):
            return self.embedding(x) + self.own(x) * self.twin(x)

    controller, model = created(Tied(), "magnitude_sparsity")
    assert {layer.name for layer in controller.statistics().magnitude_sparsity.layers} == {
        "embedding.weight",
        "own.weight",
    }
    x = data()[0][0]
    assert torch.equal(model.own.weight, model.twin.weight)
    assert torch.equal(controller.strip()(x), model(x))


class Decoder(nn.Module):
    """The MLPs of GPT-2: the inner dimension can be pruned, the residual one is normalized."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.up, self.down = Conv1D(16, 32), Conv1D(32, 16)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.down(F.gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize(
    ("make", "pruned"),
    [(Decoder, {"up.weight"}), (Own, {"first.weight", "own.weight", "experts.up", "experts.down.0", "experts.down.1"})],
)
def test_channels_of_own_layers_are_pruned(make, pruned):
    torch.manual_seed(0)
    section = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}}
    config = {"input_info": {"sample_size": [4, 8]}, "compression": section}
    controller, model = create_compressed_model(make().eval(), config)
    statistics = controller.statistics().filter_pruning
    assert {layer.name for layer in statistics.layers} == pruned
    assert {*statistics.skipped, *pruned} == {name for name, p in model.named_parameters() if p.ndim > 1} - {"position"}
    x, stripped = data()[0][0], controller.strip()
    assert torch.allclose(stripped(x), model(x), atol=1e-5)
    smaller, full = (sum(p.numel() for p in m.parameters()) for m in (stripped, model))
    assert smaller == statistics.current_parameters < full == statistics.full_parameters
    if make is Decoder:
        assert stripped.up.nf == 16
        assert stripped.up.weight.shape == (16, 16)
