"""Runs where the example plugins are installed: four algorithms of two authors and an initializer, from end to end."""

import json

import torch
from compress_extras import ScaleShift
from torch import nn

from compress_core import create_compressed_model

PRUNING = {"prune_first_conv": True, "multiple_of": 4, "filter_importance": "hoyer", "schedule": "cosine"}
SECTIONS = [
    {"algorithm": "lowrank", "rank": 8, "initializer": {"bias_correction": {"num_samples": 16}}},
    {"algorithm": "filter_pruning", "pruning_init": 0.25, "params": {**PRUNING, "pruning_target": 0.5}},
    {"algorithm": "nm_sparsity"},
    {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 16}}},
]
CONFIG = {"input_info": {"sample_size": [4, 3, 10, 10]}, "compression": SECTIONS}


def network():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3), ScaleShift(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1)]
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def train(controller, model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller.scheduler.epoch_step()
    losses = []
    for _ in range(2):
        controller.scheduler.step()
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(len(inputs)) % 4) + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    inputs = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    controller, model = create_compressed_model(network(), CONFIG, init_loader=[inputs[:8], inputs[8:]])
    losses = train(controller, model, inputs)
    state = json.loads(json.dumps(controller.get_compression_state()))
    expected = model.eval()(inputs)
    _, resumed = create_compressed_model(network(), CONFIG, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    plain = controller.strip()
    blocks = plain[5][0].weight.flatten(1).unflatten(1, (-1, 4))
    statistics = controller.statistics()
    found = {
        "algorithms": list(controller.algorithms),
        "targets": {name: entry["plan"]["targets"] for name, entry in state["algorithms"].items()},
        "losses": losses,
        "resumed_differs_by": float((resumed.eval()(inputs) - expected).detach().abs().max()),
        "corrected": [row["layer"] for row in statistics.bias_correction.to_dict()["tables"]["corrected layers"]],
        "plain": [type(module).__name__ for module in plain],
        "shapes": {name: list(tensor.shape) for name, tensor in plain.state_dict().items() if "weight" in name},
        "zeros_of_blocks": [int((blocks == 0).sum(-1).min()), blocks.shape[1]],
        "outputs": list(plain.eval()(inputs).shape),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
