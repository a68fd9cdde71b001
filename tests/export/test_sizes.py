"""Exports with sizes that vary: any dimension that the user names."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress_core import UsageError
from tests.onnx_helpers import Wired, create

pytestmark = pytest.mark.usefixtures("fast_exporter")

IMAGES = {"x": {0: "n", 2: "height", 3: "width"}}


def convolution(forward=lambda y: y.mean((2, 3)), **options):
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 3, **options), "head": nn.Linear(4, 2)}
    return Wired1(lambda self, x: forward(torch.relu(self.conv(x))), **layers)


class Wired1(Wired):
    """A model with an argument of the name x."""

    def forward(self, x):
        return self.wiring(self, x)


class Encoder(nn.Module):
    """Looks up words and mixes them; the mask has the length of the words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids, mask=None):
        hidden = self.embedding(ids)
        scores = self.mix(hidden) @ hidden.transpose(1, 2)
        if isinstance(mask, torch.Tensor):
            scores = scores.masked_fill(~mask[:, None], -1e4)
        return self.head(scores.softmax(-1) @ hidden)


def shape_of(entry):
    return [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]


def check(file, model, *inputs):
    with torch.no_grad():
        expected = model(*inputs)
    np.testing.assert_allclose(file.run(*inputs)[0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_images_of_any_size(exported):
    model = convolution()
    report, file = exported(model, torch.randn(2, 3, 8, 8), dynamic_shapes=IMAGES)
    assert shape_of(file.graph.input[0]) == ["n", 3, "height", "width"]
    check(file, model, torch.randn(5, 3, 20, 11))
    seen = {agreement.sizes for agreement in report.agreements}
    assert {"n 2, height 8, width 8", "n 3, height 8, width 8", "n 2, height 9, width 8"} <= seen
    assert "n 3, height 9, width 9" in seen and "height 9" in report.to_str()


def test_the_batch_varies_too_if_nobody_names_it(exported):
    model = convolution(padding=1)
    report, file = exported(model, torch.randn(4, 3, 8, 8), dynamic_shapes={"x": {-2: "height"}})
    assert shape_of(file.graph.input[0]) == ["batch", 3, "height", 8]
    assert not report.notes
    assert {(agreement.batch_size, agreement.sizes) for agreement in report.agreements} == {
        (4, "height 8"),
        (1, "height 8"),
        (4, "height 9"),
    }
    check(file, model, torch.randn(3, 3, 16, 8))
    x = torch.randn(4, 3, 8, 8)
    _, file = exported(convolution(), x, dynamic_shapes={"x": {2: "height"}}, dynamic_batch=False)
    assert shape_of(file.graph.input[0]) == [4, 3, "height", 8]


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({"ids": {0: "n", 1: "length"}, "mask": {0: "n", 1: "length"}}, {}),
        ([{0: "n", 1: "length"}, ("n", "length")], {}),
        ({"a b": {0: "n", 1: "length"}, "m": ["n", "length"]}, {"input_names": ["a b", "m"]}),
    ],
)
def test_texts_of_any_length(exported, shapes, options):
    model, ids = Encoder(), torch.randint(0, 10, (2, 6))
    _, file = exported(model, (ids, ids > 2), dynamic_shapes=shapes, **options)
    assert [shape_of(entry) for entry in file.graph.input] == [["n", "length"]] * 2
    other = torch.randint(0, 10, (3, 9))
    other[:, 0] = 9
    check(file, model, other, other > 2)


def test_a_quantized_model(tmp_path):
    from tests.onnx_helpers import File

    data = torch.randn(4, 3, 8, 8)
    controller = create(convolution(padding=1), [data])
    report = controller.export_onnx(tmp_path / "model.onnx", data, dynamic_shapes=IMAGES)
    file = File(tmp_path / "model.onnx")
    assert shape_of(file.graph.input[0]) == ["n", 3, "height", "width"]
    assert not report.notes
    other = torch.randn(2, 3, 12, 10)
    with torch.no_grad():
        expected = controller.model(other).numpy()
    assert np.abs(file.run(other)[0] - expected).max() < 0.05


def test_sizes_of_one_in_the_example(exported):
    model, ids = Encoder(), torch.randint(0, 10, (1, 1))
    report, file = exported(model, ids, dynamic_shapes=[("n", "length")])
    assert not report.notes and shape_of(file.graph.input[0]) == ["n", "length"]
    check(file, model, torch.randint(0, 10, (3, 7)))


def test_multiples(exported):
    """Sizes that have to be multiples of a number: the U-Net's kind."""

    def forward(y):
        return F.interpolate(F.max_pool2d(y, 4), scale_factor=4) + y

    model = convolution(forward, padding=1)
    report, file = exported(model, torch.randn(2, 3, 16, 16), dynamic_shapes=IMAGES)
    assert shape_of(file.graph.input[0]) == ["n", 3, "height", "width"]
    assert any("height 32" in agreement.sizes for agreement in report.agreements)
    check(file, model, torch.randn(1, 3, 8, 24))


def test_smallest_sizes_are_said(exported):
    model = convolution(lambda y: F.conv2d(y, torch.ones(4, 4, 5, 5)).flatten(1).sum(1))
    report, file = exported(model, torch.randn(2, 3, 16, 16), dynamic_shapes=IMAGES)
    text = "because the model fails or computes something else on others"
    assert f"is for height of at least 7, {text}" in report.notes
    check(file, model, torch.randn(1, 3, 7, 9))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        pytest.param(lambda y: y.flatten(2) @ torch.ones(36, 2), "the model fails on others .*mat", id="fails"),
        pytest.param(lambda y: torch.stack([row.sum() for row in y.unbind(2)]), "constant", id="loop"),
    ],
)
def test_what_does_not_vary_is_fixed_and_said(exported, caplog, forward, reason):
    model = convolution(forward)
    with caplog.at_level(logging.WARNING):
        report, file = exported(model, torch.randn(2, 3, 8, 8), dynamic_shapes={"x": {0: "n", 2: "height"}})
    assert shape_of(file.graph.input[0]) == ["n", 3, 8, 8]
    (note,) = report.notes
    assert re.search(f"takes height of 8 only, because .*{reason}", note)
    assert "dimension_" not in note and note in caplog.text


def test_branches_on_a_size_are_found(exported):
    """A file that computes something else on another size is not left as if it took any."""
    model = convolution(lambda y: y.mean((2, 3)) * (2 if y.shape[3] % 2 else 1), padding=1)
    report, file = exported(model, torch.randn(2, 3, 8, 8), dynamic_shapes=IMAGES)
    assert shape_of(file.graph.input[0]) == ["n", 3, "height", 8]
    assert "takes width of 8 only" in report.notes[0] and "n 2, height 8, width 9" in report.notes[0]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": {1: "a"}}, r"dynamic_shapes: the model has no input 'y'; it has ids, mask"),
        ({"ids": {2: "a"}}, r"dynamic_shapes\['ids'\]: 2 is no dimension .* \(2, 6\); there are 0 to 1"),
        ({"ids": {"1": "a"}}, r"dynamic_shapes\['ids'\]: '1' is no dimension"),
        ({"ids": {True: "a"}}, r"True is no dimension"),
        ({"ids": {1: 5}}, r"dynamic_shapes\['ids'\]\[1\]: 5 is no name"),
        ({"ids": {1: torch.export.Dim("a")}}, r"is no name; give the size a name, such as 'length'"),
        ({"ids": ["a"]}, r"1 entries for the 2 dimensions"),
        ({"ids": "a"}, r"'a' must be a dict"),
        ({"ids": {0: "a", 1: "a"}}, r"'a' stands for different sizes: 2 \(tensor 0, dimension 0\), 6"),
        ({"mask": {1: "a"}}, r"\['mask'\]: the argument is 3 \(int\), and only tensors have sizes"),
        ([None, None, {1: "a"}], r"3 entries for 2 arguments \(ids, mask\)"),
        ("ids", r"'ids' must be a dict"),
    ],
)
def test_wrong_names_and_dimensions(exported, shapes, message):
    with pytest.raises(UsageError, match=message):
        exported(Encoder(), (torch.randint(0, 10, (2, 6)), 3), dynamic_shapes=shapes)


def test_nested_arguments(exported):
    torch.manual_seed(0)
    model = Wired1(lambda self, x: self.layer(x["a"][0]).sum(1) + x["b"].sum(1), layer=nn.Linear(8, 4))
    example = ({"a": [torch.randn(2, 5, 8)], "b": torch.randn(2, 3, 4)},)
    _, file = exported(model, example, dynamic_shapes={"x": {"a": [{1: "a"}], "b": {1: "b"}}})
    assert [shape_of(entry) for entry in file.graph.input] == [["batch", "a", 8], ["batch", "b", 4]]


def test_parts_of_arguments_that_are_not_there(exported):
    model = Wired1(lambda self, x: self.layer(x["a"]), layer=nn.Linear(8, 4))
    with pytest.raises(UsageError, match=r"dynamic_shapes\['x'\]: the argument has no 'c'; it has 'a'"):
        exported(model, ({"a": torch.randn(2, 8)},), dynamic_shapes={"x": {"c": {1: "a"}}})
