"""The examples of docs/loops.md run as they stand."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress_core import create_compressed_model
from tests.conftest import ROOT
from tests.integrations.plain_loop import CONFIG, Labelled, Network, calibration, images

transformers = pytest.importorskip("transformers")
pl = pytest.importorskip("lightning.pytorch")
pytest.importorskip("accelerate")

BLOCKS = {
    library: block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), re.DOTALL)
    for library in ("transformers", "lightning", "accelerate")
    if f"integrations.{library}" in block
}


class Named(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        inputs, labels = images()
        return {"images": inputs[index], "labels": labels[index]}


class Saving(Labelled):
    def save_pretrained(self, folder):
        self.saved = folder


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def space(tmp_path):
    """The names that the examples leave to the reader."""
    return {
        "config": copy.deepcopy(CONFIG),
        "create_compressed_model": lambda *args: create_compressed_model(*args, init_loader=calibration()),
        "model": Saving(),
        "module": Module(),
        "data": Named(),
        "loader": DataLoader(TensorDataset(*images()), 16),
        "criterion": F.cross_entropy,
        "epochs": 3,
        "args": transformers.TrainingArguments(str(tmp_path), num_train_epochs=3, report_to=[], use_cpu=True),
    }


@pytest.mark.parametrize("library", ["transformers", "lightning", "accelerate"])
def test_example_runs_and_compresses(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = space(tmp_path)
    if library == "accelerate":
        names |= {"model": Network(), "optimizer": torch.optim.SGD(Network().parameters(), 0.05)}
    exec(BLOCKS[library].replace("max_epochs=10", "max_epochs=3"), names)
    assert names["controller"].sparsity_level == pytest.approx(0.7, abs=0.01)
