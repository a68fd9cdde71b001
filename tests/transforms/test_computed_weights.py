"""Reading gives the computed weight; a write to what was read is a write to the stored parameter, and never lost."""

import copy
import io

import pytest
import torch
from torch import nn

from compress_core import (
    Stage,
    TransformError,
    UsageError,
    create_compressed_model,
    mask_weight,
    register_default_init_args,
)
from compress_core.transforms import add_weight_transform, bake_transforms, raw_parameter

MASK = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
DELTA = torch.arange(12.0).reshape(3, 4)


class Net(nn.Module):
    """A layer, and an adapter that is merged in several ways."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3)

    def forward(self, x):
        return self.base(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    mask_weight(model, "base.weight", MASK)
    return model


def by_data(layer):
    layer.weight.data += DELTA


def by_data_of_a_variable(layer):
    weight = layer.weight
    weight.data = (
        weight.data + DELTA * MASK + (raw_parameter(layer, "weight").detach() * (1 - MASK) + DELTA * (1 - MASK))
    )


def in_place(layer):
    with torch.no_grad():
        layer.weight.add_(DELTA)


def by_operator(layer):
    with torch.no_grad():
        layer.weight += DELTA


def by_other_operators(layer):
    with torch.no_grad():
        layer.weight *= 2.0
        layer.weight /= 2.0
        layer.weight -= -DELTA


def by_copy(layer):
    with torch.no_grad():
        layer.weight.copy_(raw_parameter(layer, "weight") + DELTA)


def by_assignment(layer):
    layer.weight = nn.Parameter(raw_parameter(layer, "weight").detach() + DELTA)


def by_new_data(layer):
    layer.weight.data = raw_parameter(layer, "weight").detach() + DELTA


def by_rows(layer):
    for row, delta in zip(layer.weight.data, DELTA, strict=True):
        row.add_(delta)


def by_index(layer):
    data = layer.weight.data
    for i in range(3):
        data[i] = raw_parameter(layer, "weight").detach()[i] + DELTA[i]


def by_flat_view(layer):
    layer.weight.detach().view(-1).add_(DELTA.view(-1))


def by_transposed_view(layer):
    layer.weight.data.T.add_(DELTA.T)


def by_out(layer):
    with torch.no_grad():
        torch.add(raw_parameter(layer, "weight").detach().clone(), DELTA, out=layer.weight)


def by_foreach(layer):
    with torch.no_grad():
        torch._foreach_add_([layer.weight], [DELTA])


WRITES = [
    *(
        by_data,
        by_data_of_a_variable,
        in_place,
        by_operator,
        by_other_operators,
        by_copy,
        by_assignment,
        by_new_data,
        by_rows,
        by_index,
    ),
    *(by_flat_view, by_transposed_view, by_out, by_foreach),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_reaches_the_parameter(net, write):
    expected = raw_parameter(net, "base.weight").detach() + DELTA
    if write is by_assignment:
        layer = net.base
        write(layer)
    else:
        stored = raw_parameter(net, "base.weight")
        write(net.base)
        assert raw_parameter(net, "base.weight") is stored
    assert torch.allclose(raw_parameter(net, "base.weight"), expected)
    assert torch.allclose(net.base.weight, expected * MASK)
    x = torch.randn(2, 4)
    out = net(x)
    assert torch.allclose(out, x @ (expected * MASK).T + net.base.bias)
    bake_transforms(net)
    assert torch.equal(net(x), out)
    assert type(net.base.weight) is nn.Parameter


def test_what_was_read_before_a_write_shows_it(net):
    weight = net.base.weight
    data = weight.data
    data += DELTA
    assert torch.equal(weight, net.base.weight)
    assert torch.equal(data, net.base.weight)
    assert torch.equal(weight == 0, MASK == 0)


def test_initialization_reaches_the_parameter(net):
    nn.init.constant_(net.base.weight, 3.0)
    assert torch.equal(raw_parameter(net, "base.weight"), torch.full((3, 4), 3.0))
    nn.init.kaiming_uniform_(net.base.weight, a=1)
    first = raw_parameter(net, "base.weight").detach().clone()
    assert first.unique().numel() == 12
    net.base.reset_parameters()
    assert not torch.equal(raw_parameter(net, "base.weight"), first)


def test_random_numbers_are_drawn_once(net):
    plain = nn.Linear(4, 3)
    for layer in (plain, net.base):
        torch.manual_seed(1)
        nn.init.normal_(layer.weight)
        layer.weight.data.normal_()
    assert torch.equal(raw_parameter(net, "base.weight"), plain.weight)


def test_switches_and_gradients_are_those_of_the_parameter(net):
    stored = raw_parameter(net, "base.weight")
    net(torch.ones(1, 4)).sum().backward()
    assert net.base.weight.grad is stored.grad
    net.base.weight.grad = None
    assert stored.grad is None
    net.base.weight.requires_grad_(False)
    assert not stored.requires_grad
    net.base.weight.requires_grad = True
    assert stored.requires_grad
    seen = []
    net.base.weight.register_hook(seen.append)
    net(torch.ones(1, 4)).sum().backward()
    assert len(seen) == 1


def test_writes_outside_of_no_grad_are_refused_as_for_plain_layers(net):
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        net.base.weight.add_(1.0)


def test_writes_that_cannot_be_forwarded_are_refused(net):
    with pytest.raises(TransformError, match="relu writes to the weight 'weight' of a compressed Linear"):
        nn.functional.relu(net.base.weight.data, inplace=True)
    with pytest.raises(ValueError, match="read-only"):
        net.base.weight.detach().numpy()[0, 0] = 7.0


def test_results_of_computations_are_ordinary_tensors(net):
    weight = net.base.weight
    for result in (weight * 2, weight.sum(), weight.clone(), weight.abs().view(-1), weight.detach().double()):
        assert type(result) is torch.Tensor
    (weight**2).sum().backward()
    assert torch.equal(raw_parameter(net, "base.weight").grad, 2 * raw_parameter(net, "base.weight") * MASK)
    assert type(copy.deepcopy(weight.detach())) is torch.Tensor
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["w"], weight)
    assert repr(weight).startswith("tensor(")


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("read", [lambda w: w, lambda w: w.data, lambda w: w[:2], lambda w: w.detach().clone()])
def test_a_parameter_made_from_a_weight_is_an_ordinary_one(net, read, requires_grad):
    before = raw_parameter(net, "base.weight").detach().clone()
    made = nn.Parameter(read(net.base.weight), requires_grad=requires_grad)
    assert type(made) is nn.Parameter
    assert made.requires_grad is requires_grad
    assert made.is_leaf
    assert torch.equal(made, (before * MASK)[: len(made)])
    with torch.no_grad():
        made.add_(1.0)
    assert torch.equal(raw_parameter(net, "base.weight"), before)
    other = nn.Linear(4, len(made), bias=False)
    other.weight = made
    other(torch.ones(1, 4)).sum()
    assert copy.deepcopy(other).weight.requires_grad is requires_grad


def test_forwards_read_ordinary_tensors(net):
    seen = []

    class Reader(Net):
        def forward(self, x):
            seen.append(type(self.base.weight))
            return self.base(x)

    model = Reader()
    mask_weight(model, "base.weight", MASK)
    model(torch.ones(1, 4))
    assert seen == [torch.Tensor]


def test_a_merge_within_a_forward_reaches_the_parameter():
    class Merging(Net):
        def merge(self):
            self.base.weight.data += DELTA

        def forward(self, x):
            self.merge()
            return self.base(x)

    model = Merging()
    mask_weight(model, "base.weight", MASK)
    expected = raw_parameter(model, "base.weight").detach() + DELTA
    model(torch.ones(1, 4))
    assert torch.equal(raw_parameter(model, "base.weight"), expected)


def test_compiled_layers_and_those_in_helper_methods_compute_the_same(net):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def project(self, x):
            return x @ self.w

        def forward(self, x):
            return self.project(x)

    own = Own()
    mask_weight(own, "w", MASK.T)
    x = torch.randn(2, 4)
    expected = x @ (raw_parameter(own, "w") * MASK.T)
    assert torch.equal(own.project(x), expected)  # not within a module's call
    assert torch.equal(own(x), expected)
    assert torch.allclose(torch.compile(own, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.parametrize("algorithm", ["quantization", "magnitude_sparsity", "filter_pruning"])
def test_an_adapter_can_be_merged_into_each_kind_of_compressed_layer(algorithm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    section = {
        "quantization": {"initializer": {"range": {"num_init_samples": 8}}},
        "magnitude_sparsity": {"sparsity_init": 0.5},
        "filter_pruning": {"pruning_init": 0.5},
    }[algorithm]
    config = {"input_info": {"sample_size": [2, 8]}, "compression": {"algorithm": algorithm, **section}}
    data = [(torch.randn(4, 8), 0) for _ in range(2)]
    controller, model = create_compressed_model(model, register_default_init_args(config, data))
    delta = 0.01 * torch.randn(16, 8)
    expected = raw_parameter(model, "0.weight").detach() + delta
    before = model(data[0][0])
    model[0].weight.data += delta
    assert torch.equal(raw_parameter(model, "0.weight"), expected)
    after = model(data[0][0])
    assert not torch.equal(before, after)
    assert torch.allclose(controller.strip()(data[0][0]), after, atol=1e-5)


def test_ranges_of_weights_are_measured_again_after_a_merge():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    section = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8, "type": "min_max"}}}
    data = [(torch.randn(4, 8), 0) for _ in range(2)]
    config = register_default_init_args({"compression": section}, data)
    controller, model = create_compressed_model(copy.deepcopy(plain), config)
    delta = torch.randn(16, 8)  # larger than the weights
    for net in (plain, model):
        net[0].weight.data += delta
    assert (model[0].weight - plain[0].weight).abs().max() > 0.5  # clipped to the range of before
    controller.init_range("weights")
    assert (model[0].weight - plain[0].weight).abs().max() < 0.05
    with pytest.raises(UsageError, match="takes 'weights' or 'activations', got 'bias'"):
        controller.init_range("bias")


def test_a_transform_without_effect_gives_the_parameter_itself():
    layer = nn.Linear(2, 2)
    add_weight_transform(layer, "weight", nn.Identity(), stage=Stage.SPARSITY)
    layer.weight.data.zero_()
    assert not raw_parameter(layer, "weight").any()
