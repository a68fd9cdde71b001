"""NNCF's documents, a section and a loader."""

from pathlib import Path

import pytest
import torch

from compress_core import ConfigError, create_compressed_model
from tests.zoo import ResidualNet, images

# The two documents of NNCF's documentation, byte for byte.
DOCUMENTED = Path(__file__).resolve().parent.parent / "data"
SPARSITY = DOCUMENTED / "magnitude_sparsity_bn_adaptation.json"
QUANTIZATION = DOCUMENTED / "quantization_bn_adaptation.json"


def section(**values):
    return {"compression": {"algorithm": "magnitude_sparsity", **values}}


def loader(batches=4):
    return [(images(8), torch.zeros(8)) for _ in range(batches)]


def message(config):
    with pytest.raises(ConfigError) as caught:
        create_compressed_model(ResidualNet(), config, init_loader=loader())
    return str(caught.value)
