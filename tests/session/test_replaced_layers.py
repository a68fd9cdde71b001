"""Layers that the user replaces, removes, adds, shares or moves after creation, against every method of the controller."""

import copy

import pytest
import torch
from torch import nn

from compress_core import UsageError, create_compressed_model, register_default_init_args

DATA = [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(n)), 0) for n in range(2)]
RANGES = {"range": {"num_init_samples": 4}}
PARAMS = {"prune_first_conv": True, "multiple_of": 2, "pruning_target": 0.5}
SECTIONS = {
    "quantization": {"algorithm": "quantization", "initializer": RANGES},
    "sparsity": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
    "pruning": {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": PARAMS},
}
SETS = [("quantization",), ("sparsity",), ("pruning",), ("pruning", "sparsity", "quantization")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head, self.extra = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        y = self.block(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.head(y) + self.extra(y) if "extra" in self._modules else self.head(y)


def replace(model):
    model.head = nn.Linear(8, 10)
    model.extra = nn.Linear(8, 10)
    return ["extra", "head"]


def replace_same_shape(model):
    model.head = nn.Linear(8, 4)
    return ["head"]


def delete(model):
    del model.extra
    return ["extra"]


def add(model):
    model.adapter = nn.Linear(4, 4)
    model.register_forward_hook(lambda module, args, output: module.adapter(output))
    return []


def share(model):
    model.extra = model.head
    return ["extra"]


def replace_container(model):
    model.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return ["head"]


CHANGES = [replace, replace_same_shape, delete, add, share, replace_container]


def create(*names, model=None):
    config = register_default_init_args({"compression": [SECTIONS[name] for name in names]}, DATA)
    torch.manual_seed(0)
    return create_compressed_model(model or Net(), config)


def train(controller, model):
    model.train()
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    (model(DATA[0][0]).square().mean() + controller.loss()).backward()
    controller.scheduler.epoch_step()


def set_rates(controller, names):
    if len(names) == 1 and names != ("quantization",):
        controller.compression_rate = 0.4
    for algorithm in controller.algorithms.values():
        if hasattr(algorithm, "freeze"):
            algorithm.freeze(False)
    if "sparsity" in names:
        controller.set_sparsity_level(0.6)
        assert controller.sparsity_level == pytest.approx(0.6, abs=0.01)
    if "pruning" in names:
        controller.set_pruning_level(0.5, run_batchnorm_adaptation=True)
    if "quantization" in names:
        controller.init_range()


def same_result(controller, model):
    model.eval()
    plain = controller.strip().eval()
    torch.testing.assert_close(plain(DATA[0][0]), model(DATA[0][0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_method_of_the_controller(change, names, caplog):
    controller, model = create(*names)
    compressed = {f"{n}.weight" for n in change(model)}
    caplog.clear()
    train(controller, model)
    set_rates(controller, names)
    controller.adapt_batchnorm(DATA)
    assert 0 <= controller.compression_rate <= 1
    assert controller.compression_stage()
    assert repr(controller)
    statistics = controller.statistics()
    assert str(statistics)
    if compressed:
        listed = set(statistics.replaced_layers.layers)
        # Which layers an algorithm had chosen is its business; pruning masks those that read pruned channels.
        assert listed <= {name.rpartition(".")[0] for name in compressed}
        assert listed or names == ("pruning",)
        assert "replaced or removed after create_compressed_model" in caplog.text
        with pytest.raises(UsageError, match=r"get_compression_state\(\): the layers .* were replaced or removed"):
            controller.get_compression_state()
    else:
        assert "replaced_layers" not in statistics.parts
        controller.get_compression_state()
    if "sparsity" in names:
        assert not compressed & set(controller.sparsified_module_info)
    if "pruning" in names and change is replace_container:
        for method in (controller.strip, controller.shrink):
            with pytest.raises(UsageError, match=r"the layer 'head' was replaced.*dimension 1 of 'head.weight'"):
                method()
        return
    same_result(controller, model)
    if "pruning" in names:
        controller.shrink()
        same_result(controller, model)


def test_new_layers_are_plain():
    controller, model = create("quantization")
    model.head = nn.Linear(8, 10)
    model.extra = nn.Linear(8, 10)
    assert type(controller.strip().head) is nn.Linear
    assert not any(name.startswith("head") for name in controller.all_quantizations)
    assert "head" in controller.statistics().to_dict()["replaced_layers"]["layers"]


def test_a_layer_that_was_moved_is_named():
    for names in SETS:
        controller, model = create(*names)
        model.body = nn.Sequential(model.block)
        del model.block
        with pytest.raises(UsageError, match=r"'block\.\w' was moved to 'body\.0\.\w'.*Move it back"):
            controller.statistics()
        with pytest.raises(UsageError, match="was moved"):
            controller.strip()
        model.block = model.body[0]
        del model.body
        assert str(controller.statistics())


def test_a_pruned_layer_that_was_replaced_is_named():
    controller, model = create("pruning")
    model.stem = nn.Conv2d(3, 8, 3, padding=1)
    for method in (lambda: controller.set_pruning_level(0.5), controller.scheduler.epoch_step, controller.strip):
        with pytest.raises(UsageError, match=r"'stem'.*replaced or removed after create_compressed_model"):
            method()


def test_a_copied_layer_goes_on_as_the_original():
    controller, model = create("pruning", "sparsity", "quantization")
    model.head = copy.deepcopy(model.head)
    assert "replaced_layers" not in controller.statistics().parts
    same_result(controller, model)
