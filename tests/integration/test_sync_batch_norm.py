"""SyncBatchNorm: converted before, all is as with BatchNorm, bit for bit; afterwards it works or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_core import ModelError, create_compressed_model
from tests.integration.test_ranks import batches

convert = nn.SyncBatchNorm.convert_sync_batchnorm
PASS = {"num_bn_adaptation_samples": 16}
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
PRUNED = {"algorithm": "filter_pruning", "pruning_init": 0.4, "params": {"multiple_of": 1, "prune_first_conv": True}}
QUANTIZED = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
RECONSTRUCTED = {
    **SPARSE,
    "params": {"weight_importance": "reconstruction"},
    "initializer": {"weight_reconstruction": {"num_samples": 8}},
}


class Net(nn.Module):
    """One batch norm is followed by nothing that reads channels alone, so its own output is quantized."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second, self.added = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last = nn.Linear(96, 3)
        for norm in (self.norm, self.added):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last((self.added(self.second(x)) + x).flatten(1))


def document(algorithms, method):
    first, *others = algorithms
    initializer = {**first.get("initializer", {}), "batchnorm_adaptation": {**PASS, "method": method}}
    return {
        "input_info": {"sample_size": [1, 2, 6, 6]},
        "compression": [{**first, "initializer": initializer}, *others],
    }


def lifecycle(model, config, path):
    """Returns all that the compression of a model leads to."""
    controller, model = create_compressed_model(model, config, init_loader=batches()[:4])
    model.train()
    controller.adapt_batchnorm(num_samples=12)
    if "magnitude_sparsity" in controller.algorithms and "params" not in config["compression"][0]:
        controller.set_sparsity_level(0.6, run_batchnorm_adaptation=True)
    controller.scheduler.epoch_step()
    found = {f"state {key}": value.clone() for key, value in model.state_dict().items()}
    x = batches()[0]
    found["output"] = model.eval()(x)
    found["stripped"] = controller.strip().eval()(x)
    if path is not None:
        controller.export_onnx(path)
    if "filter_pruning" in controller.algorithms:
        controller.shrink()
        found["shrunk"] = model.eval()(x)
    return found, path and path.read_bytes()


@pytest.mark.parametrize(
    ("algorithms", "method", "exports"),
    [
        ([SPARSE], "exact", False),
        ([RECONSTRUCTED], "momentum", False),
        ([SPARSE, PRUNED, QUANTIZED], "paired", False),
        pytest.param([SPARSE, PRUNED, QUANTIZED], "paired", True, marks=pytest.mark.slow),
    ],
    ids=["sparsity", "reconstruction", "all", "all, exported"],
)
def test_converted_before_all_is_as_with_batch_norm(algorithms, method, exports, tmp_path):
    config = document(algorithms, method)
    paths = [tmp_path / "plain.onnx", tmp_path / "sync.onnx"] if exports else [None, None]
    expected, file = lifecycle(Net(), config, paths[0])
    found, other = lifecycle(convert(Net()), config, paths[1])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert other == file


@pytest.mark.parametrize("algorithms", [[PRUNED], [QUANTIZED]], ids=["masks", "quantizers"])
def test_a_compressed_batch_norm_is_not_converted_and_stays_as_it_was(algorithms):
    controller, model = create_compressed_model(Net(), document(algorithms, "paired"), init_loader=batches()[:4])
    x, names = batches()[0], [type(module) for module in model.modules()]
    before = model.eval()(x)
    with pytest.raises(ModelError, match="Convert the model before create_compressed_model"):
        convert(model.added)
    assert [type(module) for module in model.modules()] == names
    assert model.added.num_features == 6
    assert torch.equal(model(x), before)
    with pytest.raises(ModelError, match="Convert the model before"):
        convert(model)
    assert torch.equal(model(x), before)  # what has been replaced before it had no transforms
    controller.adapt_batchnorm(num_samples=4)


def test_a_batch_norm_that_is_not_compressed_may_be_converted_later():
    config = document([SPARSE], "paired")
    (first, plain), (second, model) = (
        create_compressed_model(Net(), config, init_loader=batches()[:4]) for _ in range(2)
    )
    convert(model)
    for controller in (first, second):
        controller.set_sparsity_level(0.7, run_batchnorm_adaptation=True)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
