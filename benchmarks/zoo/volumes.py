"""Diffusion networks of diffusers, and medical networks of MONAI."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entries import Case, Entry

_BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def _conditional_unet() -> Case:
    make = importlib.import_module("diffusers").UNet2DConditionModel
    model = make(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **_BLOCKS,
    )

    def batch() -> dict[str, Any]:
        return {
            "sample": torch.randn(2, 4, 16, 16),
            "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(2, 5, 32),
        }

    return _denoiser(model, batch)


def _unet() -> Case:
    make = importlib.import_module("diffusers").UNet2DModel
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = make(sample_size=16, attention_head_dim=8, **kinds, **_BLOCKS)
    return _denoiser(model, lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 500])})


def _denoiser(model: nn.Module, batch: Callable[[], dict[str, Any]]) -> Case:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.mse_loss(model(**batch).sample, torch.ones_like(batch["sample"]))

    return Case(model, [batch(), batch()], loss)


def _autoencoder() -> Case:
    make = importlib.import_module("diffusers").AutoencoderKL
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = make(sample_size=16, latent_channels=4, **kinds, **_BLOCKS)
    batches = [{"sample": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    return Case(model, batches, lambda model, batch: F.mse_loss(model(**batch).sample, batch["sample"]))


_MONAI: dict[str, tuple[dict[str, Any], int]] = {
    "UNet": (
        {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 2,
            "channels": (8, 16, 32),
            "strides": (2, 2),
            "num_res_units": 2,
        },
        16,
    ),
    "BasicUNet": ({"features": (8, 8, 16, 16, 32, 8)}, 32),
    "SegResNet": ({"init_filters": 8, "in_channels": 1, "out_channels": 2}, 16),
    "UNETR": (
        {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": 32,
            "feature_size": 8,
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_heads": 4,
        },
        32,
    ),
}


def _monai(name: str, options: dict[str, Any], size: int) -> Case:
    model = getattr(importlib.import_module("monai.networks.nets"), name)(**options)
    criterion = importlib.import_module("monai.losses").DiceCELoss(to_onehot_y=True, softmax=True)
    shape = (2, 1, size, size, size)

    def batch() -> dict[str, Any]:
        return {"image": torch.rand(shape), "label": torch.randint(0, 2, shape).float()}

    def outputs(model: nn.Module, batch: Any) -> Any:
        return model(batch["image"])

    return Case(
        model, [batch(), batch()], lambda model, batch: criterion(outputs(model, batch), batch["label"]), outputs
    )


def entries() -> Iterator[Entry]:
    """Yields the networks."""
    yield Entry("UNet2DConditionModel", "diffusers", "diffusion", _conditional_unet)
    yield Entry("UNet2DModel", "diffusers", "diffusion", _unet)
    yield Entry("AutoencoderKL", "diffusers", "diffusion", _autoencoder)
    for name, (options, size) in _MONAI.items():
        yield Entry(
            f"monai.{name}",
            "monai",
            "medical and video",
            lambda n=name, o=options, s=size: _monai(n, o, s),  # type: ignore[misc]
        )
