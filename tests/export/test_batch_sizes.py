"""Exports of models that do not take, or compute something else on, other batch sizes than the example's."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

from tests.onnx_helpers import Wired

pytestmark = pytest.mark.usefixtures("fast_exporter")


def model(forward):
    torch.manual_seed(0)
    return Wired(lambda self, x: forward(x, self.layer(x)), layer=nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("forward", "size", "reason"),
    [
        pytest.param(lambda x, y: y.view(1, 2, 2), 1, r"fails on others .*shape '\[1, 2, 2\]'", id="one"),
        pytest.param(lambda x, y: y.view(32, 2, 2), 32, r"fails on others", id="more than are compared"),
        pytest.param(lambda x, y: y.view(int(x.shape[0]), -1), 4, "specialized it to be a constant", id="integer"),
        pytest.param(lambda x, y: torch.stack([row * 2 for row in y]), 4, "constant", id="loop over samples"),
        pytest.param(lambda x, y: y if x.shape[0] > 3 else y * 2, 4, "another branch for fewer than 4", id="few"),
        pytest.param(lambda x, y: y if x.shape[0] < 20 else y * 2, 4, "another branch for more than 19", id="many"),
        pytest.param(lambda x, y: y * 2 if x.shape[0] == 1 else y, 4, "differs from torch .* on a batch of 1", id="1"),
    ],
)
def test_the_file_takes_the_batch_size_of_the_example_and_says_why(exported, caplog, forward, size, reason):
    with caplog.at_level(logging.WARNING):
        report, file = exported(model(forward), torch.randn(size, 8))
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == size
    (note,) = report.notes
    assert note.startswith(f"takes batches of {size} only, because") and "dynamic_batch" not in note
    assert re.search(reason, note)
    assert note in caplog.text
    assert {agreement.batch_size for agreement in report.agreements} == {size}


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        pytest.param(lambda x, y: y.view(x.shape[0] // 2, 8), {4, 8}, id="even"),
        pytest.param(lambda x, y: (y - y.mean(0)) / y.std(0), {4, 1}, id="statistics of the batch"),
    ],
)
def test_models_of_which_only_some_batch_sizes_work_stay_dynamic(exported, forward, sizes):
    report, file = exported(model(forward), torch.randn(4, 8))
    assert not report.notes and {agreement.batch_size for agreement in report.agreements} == sizes
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_model_that_refuses_single_samples_is_compared_on_others(exported):
    def forward(x, y):
        if x.shape[0] == 1:
            raise ValueError("expected more than 1 value per channel")
        return y

    report, _ = exported(model(forward), torch.randn(4, 8))
    assert {agreement.batch_size for agreement in report.agreements} == {4, 5}


def test_the_batch_dimension_is_the_one_that_outputs_have(exported):
    torch.manual_seed(0)
    mixing = Wired(lambda self, mask, x: self.layer(mask @ x), layer=nn.Linear(8, 4))
    report, file = exported(mixing, (torch.randn(5, 5), torch.randn(4, 5, 8)))
    first = [entry.type.tensor_type.shape.dim[0] for entry in file.graph.input]
    assert [dim.dim_param or dim.dim_value for dim in first] == [5, "batch"]
    assert {agreement.batch_size for agreement in report.agreements} == {4, 1}


def test_one_batch_size_if_the_user_wants_it_needs_no_note(exported):
    report, _ = exported(model(lambda x, y: y.view(1, 2, 2)), torch.randn(1, 8), dynamic_batch=False)
    assert not report.notes and {agreement.batch_size for agreement in report.agreements} == {1}
