"""Sparse gradients of embeddings, and weights of dtypes that cannot be compressed, under every algorithm."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress_core import CompressionError, create_compressed_model

ALGORITHMS = {
    "quantization": {},
    "magnitude_sparsity": {"sparsity_init": 0.5, "params": {"sparsity_target": 0.6}},
    "filter_pruning": {"pruning_init": 0.4, "params": {"pruning_target": 0.4, "num_init_steps": 0}},
}


class Looked(nn.Module):
    def __init__(self, cls, sparse):
        super().__init__()
        self.table, self.hidden, self.last = cls(16, 8, sparse=sparse), nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.table(x)
        return self.last(torch.relu(self.hidden(x if x.ndim == 2 else x.mean(1))))


class Odd(nn.Module):
    """A model one of whose weights has another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(8, 32), nn.Linear(8, 32, bias=False), nn.Linear(32, 3)
        self.alone = nn.Linear(3, 32)
        self.end = nn.Linear(32, 2)
        self.odd.weight = nn.Parameter(self.odd.weight.detach().to(dtype), requires_grad=dtype.is_complex)

    def forward(self, x):
        weight = self.odd.weight
        other = self.odd(x.to(weight.dtype)).abs() if weight.is_complex() else F.linear(x, weight.to(x.dtype))
        return self.end(torch.relu(self.alone(self.last(torch.relu(self.first(x)) + other))))


def create(name, model, data):
    return create_compressed_model(model, {"compression": {"algorithm": name, **ALGORITHMS[name]}}, init_loader=[data])


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sparse_gradients_are_those_of_dense_ones(algorithm, cls):
    x, found = torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(0)), []
    for sparse in (True, False):
        torch.manual_seed(0)
        controller, model = create(algorithm, Looked(cls, sparse), x)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert gradients["table.weight"].is_sparse == sparse
        found.append({name: grad.to_dense() for name, grad in gradients.items() if grad is not None})
        torch.testing.assert_close(controller.strip().eval()(x), model.eval()(x))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_dtypes_are_listed_or_refused_by_name(algorithm, dtype):
    torch.manual_seed(0)
    model, x = Odd(dtype), torch.randn(4, 8)
    plain = copy.deepcopy(model.state_dict())
    if algorithm == "magnitude_sparsity":
        with pytest.raises(CompressionError, match=rf"'odd.weight' has the dtype {dtype}.*ignored_scopes"):
            create(algorithm, model, x)
        assert all(torch.equal(value.cfloat(), plain[name].cfloat()) for name, value in model.state_dict().items())
        return
    controller, model = create(algorithm, model, x)
    skipped = getattr(controller.statistics(), algorithm).skipped
    assert f"dtype is {dtype}" in skipped["odd.weight"] or f"has the dtype {dtype}" in skipped["odd.weight"]
    model(x).square().mean().backward()
    torch.testing.assert_close(controller.strip().eval()(x), model.eval()(x))
