"""Forwards that are attributes: accelerate's mixed precision, and what it leaves behind."""

from types import MethodType

import pytest
import torch
from torch import nn

from compress_core import TransformError, create_compressed_model

CONFIG = {
    "input_info": {"sample_size": [4, 3, 8, 8]},
    "compression": [
        {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
        {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 4}}},
    ],
}
INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def compressed():
    return create_compressed_model(network(), CONFIG, init_loader=[INPUTS])


def wrap(model):
    """What accelerate does for bf16: the method of the class, wrapped, as an attribute."""
    model._original_forward = model.forward
    function = model.forward.__func__

    def in_bfloat16(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return function(self, *args).float()

    model.forward = MethodType(in_bfloat16, model)


def test_a_wrapped_model_is_stripped_to_a_plain_one_and_stays_wrapped():
    controller, model = compressed()
    outputs = model.eval()(INPUTS)
    wrap(model)
    rounded = model(INPUTS)
    stripped = controller.strip()
    assert vars(stripped).keys().isdisjoint({"forward", "_original_forward"})
    assert torch.equal(stripped.eval()(INPUTS), outputs)
    assert torch.equal(model(INPUTS), rounded) and not torch.equal(rounded, outputs)
    with torch.no_grad():
        model[4].weight.zero_()
    assert torch.equal(stripped(INPUTS), outputs)  # the copy computes with its own weights


def test_stripping_in_place_says_how_to_take_the_wrapper_off():
    controller, model = compressed()
    wrap(model)
    rounded = model.eval()(INPUTS)
    with pytest.raises(TransformError, match="keep_fp32_wrapper=False"):
        controller.strip(do_copy=False)
    assert torch.equal(model(INPUTS), rounded)


def test_a_forward_that_is_that_of_the_class_is_no_obstacle():
    model = network()
    model.forward = MethodType(type(model).forward, model)  # what accelerate leaves when it unwraps
    controller, model = create_compressed_model(model, CONFIG, init_loader=[INPUTS])
    other, expected = compressed()
    assert torch.equal(model.eval()(INPUTS), expected.eval()(INPUTS))
    assert torch.equal(controller.strip(do_copy=False)(INPUTS), other.strip(do_copy=False)(INPUTS))


@pytest.mark.parametrize("kind", ["function", "method of another object", "another method"])
def test_any_other_forward_is_refused(kind):
    model = network()
    if kind == "function":
        model.forward = lambda x: nn.Sequential.forward(model, x)
    elif kind == "method of another object":
        model.forward = network().forward
    else:
        model.forward = MethodType(lambda self, x: nn.Sequential.forward(self, x), model)
    forward = vars(model)["forward"]
    with pytest.raises(TransformError, match="has a forward of its own"):
        create_compressed_model(model, CONFIG, init_loader=[INPUTS])
    assert vars(model)["forward"] is forward
