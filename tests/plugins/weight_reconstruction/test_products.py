"""Every product is a matrix product of chosen input rows and the weight's matrices."""

import pytest
import torch
import torch.nn.functional as F

from compress_weight_reconstruction.positions import Positions
from compress_weight_reconstruction.products import (
    as_matrices,
    as_weight,
    input_rows,
    output_rows,
    output_sizes,
    product_of,
)

CONVOLUTIONS = [
    (1, 4, 6, {}),
    (1, 4, 6, {"stride": 2, "padding": 2, "dilation": 3}),
    (2, 4, 6, {"padding": 1}),
    (2, 4, 6, {"padding": "same", "dilation": 2}),
    (2, 4, 6, {"padding": "valid", "stride": (2, 1)}),
    (2, 6, 6, {"groups": 2, "stride": 2, "padding": (0, 2)}),
    (2, 4, 8, {"groups": 4, "padding": 1}),
    (3, 2, 4, {"padding": 1, "stride": (1, 2, 1)}),
]
TRANSPOSED = [
    (1, 4, 6, {}),
    (1, 4, 6, {"stride": 3, "padding": 1, "output_padding": 2}),
    (2, 4, 6, {"stride": 2, "padding": 1, "dilation": 2}),
    (2, 6, 4, {"groups": 2, "stride": (1, 2)}),
    (2, 4, 4, {"groups": 4, "stride": 2}),
    (3, 2, 4, {"stride": 2, "padding": 1}),
]


def agree(function, x, weight, options, kind, dims, wanted):
    groups = options.get("groups", 1)
    output = function(x, weight, **options)
    samples, sizes = output_sizes(output, kind, dims)
    chosen = Positions(wanted, 1000).choose(samples, sizes, 1)
    product = product_of(function, (x, weight), options)
    matrices = as_matrices(weight, kind, groups)
    rows = input_rows(product, chosen, sizes)
    expected = output_rows(output, kind, dims, groups, chosen)
    assert rows.shape[:2] == (groups, samples * min(wanted, sizes_product(sizes)))
    torch.testing.assert_close(rows @ matrices.mT, expected)
    assert torch.equal(as_weight(matrices, weight.shape, kind), weight)


def sizes_product(sizes):
    return int(torch.tensor(sizes).prod())


@pytest.mark.parametrize("wanted", [3, 10_000])
@pytest.mark.parametrize(("dims", "inputs", "outputs", "options"), CONVOLUTIONS)
def test_convolution_is_a_product_of_patches(dims, inputs, outputs, options, wanted):
    x = torch.randn(2, inputs, *(9, 8, 7)[:dims], dtype=torch.float64)
    weight = torch.randn(outputs, inputs // options.get("groups", 1), *(3, 2, 3)[:dims], dtype=torch.float64)
    agree((F.conv1d, F.conv2d, F.conv3d)[dims - 1], x, weight, options, "conv", dims, wanted)


@pytest.mark.parametrize("wanted", [3, 10_000])
@pytest.mark.parametrize(("dims", "inputs", "outputs", "options"), TRANSPOSED)
def test_transposed_convolution_is_a_product_of_patches(dims, inputs, outputs, options, wanted):
    x = torch.randn(2, inputs, *(5, 4, 3)[:dims], dtype=torch.float64)
    weight = torch.randn(inputs, outputs // options.get("groups", 1), *(3, 2, 3)[:dims], dtype=torch.float64)
    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    agree(functions[dims - 1], x, weight, options, "transposed", dims, wanted)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("wanted", [2, 1000])
def test_linear_is_a_product_of_rows(shape, wanted):
    agree(F.linear, torch.randn(shape, dtype=torch.float64), torch.randn(4, 5).double(), {}, "linear", 1, wanted)


def test_convolution_of_one_image_without_a_batch():
    x, weight = torch.randn(4, 8, 8).double(), torch.randn(6, 4, 3, 3).double()
    agree(F.conv2d, x, weight, {"padding": 1}, "conv", 2, 5)


def test_positions_differ_between_images_and_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    chosen = Positions(16, 256).choose(8, (10, 10), 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(len(set(row.tolist())) == 16 for row in chosen)
    assert not torch.equal(chosen[0], chosen[1])
    assert Positions(16, 8).choose(8, (10, 10), 40).shape == (8, 20)  # four rows for each column
