"""The loss of knowledge distillation in NNCF 2.16 and here, on the same sparse network and images.

Usage, in an environment of its own: pip install nncf==2.16.0 torch==2.13.0, then
    pip install -e . --no-deps; python -m benchmarks.distillation_against_nncf
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from compress_core import create_compressed_model
from compress_core.contract.statistics import Table

LOSSES: list[dict[str, Any]] = [
    {"type": "mse"},
    {"type": "softmax", "temperature": 1.0},
    {"type": "mse", "scale": 10.0},
    {"type": "softmax", "temperature": 5.0},
    {"type": "softmax", "scale": 2.0, "temperature": 5.0},
]
SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.7, "params": {"weight_importance": "abs"}}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def step(controller: Any, model: nn.Module, x: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Returns the loss and its gradients."""
    model.train()(x)
    loss = controller.loss()
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def main() -> None:
    try:
        from nncf import NNCFConfig  # noqa: PLC0415
        from nncf.torch import create_compressed_model as in_nncf  # noqa: PLC0415
    except ImportError:
        sys.exit("NNCF is not installed here: pip install nncf==2.16.0 in an environment of its own")
    torch.manual_seed(0)
    plain, x, rows = Network(), torch.randn(8, 3, 8, 8), []
    for values in LOSSES:
        section = {"algorithm": "knowledge_distillation", **values}
        document = {"input_info": {"sample_size": [8, 3, 8, 8]}, "compression": [SPARSITY, section]}
        theirs, found = step(*in_nncf(copy.deepcopy(plain), NNCFConfig.from_dict(copy.deepcopy(document))), x)
        ours, mine = step(*create_compressed_model(copy.deepcopy(plain), document), x)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, mine, strict=True))
        rows.append((str(values), theirs, ours, abs(theirs - ours) / theirs, worst))
    headers = ("loss", "NNCF", "here", "relative difference", "largest difference of gradients")
    print(Table("Knowledge distillation", headers, rows).to_str())


if __name__ == "__main__":
    main()
