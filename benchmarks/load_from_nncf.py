"""Loads what NNCF 2.16 saved, and compares the outputs: python -m benchmarks.load_from_nncf write|read FOLDER.

`write` runs in an environment that has NNCF 2.16 (and not necessarily compress-core), `read` in ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(8) % 4
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.6}
INT8 = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
PRUNED = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"prune_first_conv": True}}
SECTIONS = {
    "sparse, 8 bits": [SPARSE, INT8],
    "sparse, 8 bits, asymmetric activations": [SPARSE, {**INT8, "preset": "mixed"}],
    "half of the filters": [PRUNED],
}


class Net(nn.Module):
    """Two convolutions, batch norm, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.bn, self.drop, self.fc = nn.BatchNorm2d(16), nn.Dropout(0.1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.drop(self.conv2(x).relu().mean((2, 3))))


def created(package: Any, sections: list[dict[str, Any]], seed: int) -> nn.Module:
    """Returns the compressed model."""
    torch.manual_seed(seed)
    config = package.NNCFConfig.from_dict({"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": sections})
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    package.register_default_init_args(config, torch.utils.data.DataLoader(data, batch_size=8))
    return package.create_compressed_model(Net(), config, dump_graphs=False)[1].eval()


def main() -> None:
    """Writes or reads."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        import nncf  # noqa: PLC0415 - in another environment
        import nncf.torch as package  # noqa: PLC0415

        package.NNCFConfig = nncf.NNCFConfig
    else:
        from compress_core import nncf as package  # noqa: PLC0415
    for number, (name, sections) in enumerate(SECTIONS.items()):
        model, file = created(package, sections, seed=number if what == "write" else 77), folder / f"{number}.pt"
        if what == "write":
            with torch.no_grad():
                torch.save({"state_dict": dict(model.state_dict()), "outputs": model(IMAGES)}, file)
            continue
        saved = torch.load(file, weights_only=True)
        count = package.load_state(model, saved["state_dict"])
        with torch.no_grad():
            difference = float((model(IMAGES) - saved["outputs"]).abs().max() / saved["outputs"].abs().max())
        print(f"{name}: {count} of {len(saved['state_dict'])} tensors, largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
