"""What a plan says of bits that are chosen from data."""

import pytest
from torch import nn

from compress_core import plan_compression


@pytest.mark.parametrize("kind", ["hawq", "autoq"])
@pytest.mark.parametrize(("bits", "words"), [([4, 8], "4 or 8 bits"), ([4], "4 bits"), ([2, 3, 8], "2, 3 or 8 bits")])
def test_the_bits_are_those_to_choose_from(kind, bits, words):
    plan = planned("TRIAL", {"type": kind, "bits": bits})
    assert f"weights: {words}, symmetric" in plan.to_str()
    assert "numbers of bits are chosen from data" in plan.to_str()


def test_a_device_that_leaves_no_choice_is_named():
    text = planned("CPU", {"type": "hawq", "bits": [4, 8]}).to_str()
    assert "'hawq' has nothing to choose" in text and "weights: 8 bits" in text


def planned(device, precision):
    config = {
        "input_info": {"sample_size": [1, 3, 8, 8]},
        "target_device": device,
        "compression": {"algorithm": "quantization", "initializer": {"precision": precision}},
    }
    return plan_compression(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), config)
