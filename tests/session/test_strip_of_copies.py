"""`controller.strip(model=...)`: averages and other copies of a compressed model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress_core import UsageError, create_compressed_model, register_default_init_args
from compress_core.transforms import get_weight_transform, raw_parameter

DATA = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(n)), 0) for n in range(4)]
PRUNING = {"pruning_init": 0.0, "params": {"pruning_target": 0.5, "multiple_of": 1, "prune_first_conv": True}}
SPARSITY = {"sparsity_init": 0.0, "params": {"sparsity_target": 0.5}}
STAGED = {"initializer": {"range": {"num_init_samples": 16}}, "params": {"weights_quant_start_epoch": 1}}


def created(*sections):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    config = {"input_info": {"sample_size": [4, 8]}, "compression": list(sections)}
    return create_compressed_model(model, register_default_init_args(config, DATA))


def stale(average, model):
    """Updates floating entries alone, as ultralytics does."""
    theirs = model.state_dict()
    for name, mine in average.state_dict().items():
        if mine.dtype.is_floating_point:
            mine.mul_(0.9).add_(theirs[name], alpha=0.1)


def test_masks_are_those_of_the_compressed_model():
    controller, model = created({"algorithm": "magnitude_sparsity", **SPARSITY})
    average = copy.deepcopy(model)
    controller.set_sparsity_level(0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    stale(average, model)
    plain, mine = controller.strip(model=average), controller.strip()
    assert torch.equal(plain[0].weight == 0, mine[0].weight == 0)
    kept = mine[0].weight != 0
    assert torch.allclose(plain[0].weight[kept], 1.05 / 1.5 * mine[0].weight[kept])
    assert type(plain[0]) is nn.Linear
    assert average[0].weight.count_nonzero() == 128  # the copy itself stays as it was
    assert controller.sparsity_level == 0.5


def test_an_average_with_averaged_buffers_is_stripped_as_the_model_is():
    controller, model = created({"algorithm": "magnitude_sparsity", **SPARSITY})
    average = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for level in (0.0, 0.25, 0.5):
        controller.set_sparsity_level(level)
        average.update_parameters(model)
    plain = controller.strip(model=average)
    assert torch.equal(plain[2].weight == 0, controller.strip()[2].weight == 0)


def test_pruned_channels_are_removed_from_an_average():
    controller, model = created({"algorithm": "filter_pruning", **PRUNING})
    average = copy.deepcopy(model)
    controller.set_pruning_level(0.5)
    stale(average, model)
    assert controller.strip(model=average)[0].out_features == controller.strip()[0].out_features == 8


def test_quantizers_that_are_on_are_on_in_the_average():
    controller, model = created({"algorithm": "quantization", **STAGED})
    average = copy.deepcopy(model)
    for _ in range(2):
        controller.scheduler.epoch_step()
    stale(average, model)
    plain = controller.strip(model=average)
    assert not torch.equal(plain[0].weight, raw_parameter(average, "0.weight"))
    # The scales are averages too, of provisional and measured ones.
    scale = get_weight_transform(average, "0.weight", "quantization").grid().scale
    levels = plain[0].weight / scale.view(-1, 1)
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_in_place_the_controller_stays_usable():
    controller, model = created({"algorithm": "magnitude_sparsity", **SPARSITY})
    average = copy.deepcopy(model)
    assert controller.strip(do_copy=False, model=average) is average
    assert type(average[0].weight) is nn.Parameter
    controller.set_sparsity_level(0.5)


def test_another_model_is_refused():
    controller, _ = created({"algorithm": "magnitude_sparsity", **SPARSITY})
    with pytest.raises(UsageError, match=r"is no copy of the compressed model: '.*mask' has the shape None"):
        controller.strip(model=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
