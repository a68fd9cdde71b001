"""How many multiplications weights take part in, which bit operations and compression ratios are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_quantization.precision import ChosenBits, PrecisionMethod
from tests.plugins.quantization.precision.search_helpers import document, with_method


class Recurrent(nn.Module):
    """A recurrent layer of two directions with six features."""

    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(6, 5, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


class Cell(nn.Module):
    """A recurrent layer that the model steps itself."""

    def __init__(self):
        super().__init__()
        self.cell, self.fc = nn.GRUCell(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return self.fc(h)


class Attending(nn.Module):
    """Two queries for each sequence, and products with matrices of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.matrix, self.other = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        found = self.attention(x[:, :2], x, x)[0] @ self.matrix
        return torch.einsum("bti,io->bto", found, self.other)


# For 2 sequences of 7 steps: elements of a weight times the positions that it is used at.
WORK = {
    Recurrent: {
        "lstm.weight_ih_l0": 14 * 20 * 6,
        "lstm.weight_hh_l0": 14 * 20 * 5,
        "lstm.weight_ih_l0_reverse": 14 * 20 * 6,
        "lstm.weight_hh_l0_reverse": 14 * 20 * 5,
        "fc": 14 * 10 * 3,
    },
    Cell: {"cell.weight_ih": 14 * 15 * 6, "cell.weight_hh": 14 * 15 * 5, "fc": 2 * 5 * 3},
    # The first is a matrix of three projections, of 4 queries, 14 keys and 14 values.
    Attending: {
        "attention.in_proj_weight": (4 + 14 + 14) * 36,
        "attention.out_proj": 4 * 36,
        "matrix": 4 * 6 * 4,
        "other": 4 * 4 * 3,
    },
}


def create(model, precision):
    torch.manual_seed(0)
    section = {**document(precision), "input_info": {"sample_size": [2, 7, 6]}}
    return create_compressed_model(model(), section, init_loader=[(torch.randn(2, 7, 6), torch.zeros(2))])


@pytest.mark.parametrize("model", WORK)
def test_all_multiplications_with_weights_count(model):
    seen = {}

    def choose(search):
        seen.update({w.name.removesuffix("|WEIGHT"): w for w in search.weights})
        return ChosenBits({})

    with with_method(PrecisionMethod(choose)):
        create(model, {"type": "first-first"})
    assert {name: weight.multiplications for name, weight in seen.items()} == WORK[model]
    if model is Attending:
        assert all(weight.inputs for weight in seen.values())


def test_bit_operations_of_recurrent_layers_count_activations_that_are_not_quantized():
    work = WORK[Recurrent]
    wide = sum(number for name, number in work.items() if name != "fc")
    most = (32 * wide + 8 * work["fc"]) / (8 * sum(work.values()))
    with pytest.raises(ConfigError, match=rf"and {most:.3f}.*recurrent layers, count with 32 bits"):
        create(Recurrent, {"type": "sensitivity", "budget": {"bit_operations": 0.9}})
