"""Creation leaves no trace in the user's objects: whatever forwards keep is as if none had run."""

import pytest
import torch

from compress_core import create_compressed_model, register_default_init_args
from compress_core.torch_internals import tree_leaves
from tests.session.stateful_models import (
    KINDS,
    RUN_BEFORE,
    Attribute,
    ClassAttribute,
    CountingBuffer,
    InClosure,
    MaxNormEmbedding,
)

DATA = [(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(n)), 0) for n in range(3)]
ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 6}}
PARAMS = {"prune_first_conv": True, "multiple_of": 2}
SECTIONS = [
    {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": PARAMS, "initializer": ADAPTATION},
    {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3, "initializer": ADAPTATION},
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 6}, **ADAPTATION}},
]


def config_of(*sections):
    return register_default_init_args({"compression": list(sections)}, DATA)


def assert_equal(left, right):
    """Equal values, and the same objects where these can be told apart."""
    left, right = tree_leaves(left), tree_leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor):
            assert type(a) is type(b)
            assert torch.equal(a, b)
            assert not a.is_inference()
        else:
            assert a == b or a is b


CASES = [*((kind, False) for kind in KINDS), *((kind, True) for kind in RUN_BEFORE)]


@pytest.mark.parametrize(("kind", "was_run"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_creation_leaves_no_trace(kind, was_run):
    model = kind()
    if was_run:
        with torch.no_grad():
            model.eval()(DATA[0][0])
        model.train()
    before = model.kept()
    names = list(model.state_dict())
    create_compressed_model(model, config_of(*SECTIONS))
    assert_equal(model.kept(), before)
    assert [name for name in model.state_dict() if "transforms" not in name] == names


USES = {
    "strip": lambda controller: controller.strip(),
    "adapt_batchnorm": lambda controller: controller.adapt_batchnorm(DATA),
    "initialize": lambda controller: controller.initialize("batchnorm_adaptation", DATA),
    "init_range": lambda controller: controller.init_range(),
    "measure_latency": lambda controller: controller.measure_latency(1),
    "shrink": lambda controller: controller.shrink(),
}


@pytest.mark.parametrize("kind", [Attribute, CountingBuffer, ClassAttribute, InClosure, MaxNormEmbedding])
def test_nothing_that_the_controller_does_leaves_a_trace(kind):
    model = kind()
    model(DATA[0][0]).sum().backward()  # what it keeps has a graph, which torch does not copy
    before = model.kept()
    controller, _ = create_compressed_model(model, config_of(*SECTIONS))
    for use in USES.values():
        use(controller)
        assert_equal(model.kept(), before)


def test_products_with_masks_do_not_count_as_calls_of_the_model():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(y * torch.sigmoid(y))

    sparse, quantized = (section | {"initializer": {}} for section in SECTIONS[1:])
    expected, _ = create_compressed_model(Scaled(), config_of(quantized))
    controller, _ = create_compressed_model(Scaled(), config_of(sparse, quantized))
    assert list(controller.all_quantizations) == list(expected.all_quantizations)
