"""Public networks that benchmarks go through: what is installed of torchvision, pytorchcv and transformers.

Random weights everywhere; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress_core.trace import Example

# Class -> (keywords of the config, names of the inputs: pixels of a shape, or tokens).
TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "pixels"),
    "RegNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, "pixels"),
    "MobileNetV1": ({"depth_multiplier": 0.25, "image_size": 64}, "pixels"),
    "MobileNetV2": ({"depth_multiplier": 0.25, "image_size": 64}, "pixels"),
    "EfficientNet": ({"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, "pixels"),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pixels"),
    "ConvNextV2": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "pixels"),
    "Swin": ({"image_size": 64, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}, "pixels"),
    "ViT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 64,
        },
        "pixels",
    ),
    "DeiT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 64,
        },
        "pixels",
    ),
    "Segformer": (
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
        "pixels",
    ),
    "MobileViT": (
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
        "pixels",
    ),
    "PoolFormer": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, "pixels"),
    "Bert": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "Roberta": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "DistilBert": ({"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}, "tokens"),
    "GPT2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}, "tokens"),
    "OPT": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "vocab_size": 50,
            "word_embed_proj_dim": 16,
        },
        "tokens",
    ),
    "Llama": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 50,
        },
        "tokens",
    ),
    "T5": ({"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}, "pair"),
}


@dataclass(frozen=True)
class Network:
    """A network to be tried.

    Attributes:
        name: Its name in the library that it comes from.
        make: Builds it.
        kind: What it takes: pixels, or (transformers) pixels, tokens or a pair of token sequences by keyword.
    """

    name: str
    make: Callable[[], nn.Module]
    kind: str = "image"

    def example(self, model: nn.Module) -> Example:
        """Returns an input of the size that the network was made for, or of 224 by 224 pixels."""
        return self._image(model, 1, getattr(model, "in_size", None) or (224, 224))

    def small_examples(self, model: nn.Module) -> Iterator[Example]:
        """Yields two samples of 64 by 64 pixels, then larger ones for networks that do not take those."""
        sizes = [(64, 64), (128, 128), (224, 224), (299, 299), *([model.in_size] if hasattr(model, "in_size") else [])]
        yield from (
            self._image(model, 2, size) for size in dict.fromkeys(sizes if self.kind == "image" else [(64, 64)])
        )

    def _image(self, model: nn.Module, samples: int, size: tuple[int, int]) -> Example:
        if self.kind == "image":
            return Example.of(torch.randn(samples, getattr(model, "in_channels", 3), *size))
        if self.kind == "pixels":
            return Example.of(pixel_values=torch.randn(2, 3, 64, 64))
        tokens = torch.randint(2, 50, (2, 7))
        if self.kind == "pair":
            return Example.of(input_ids=tokens, decoder_input_ids=tokens)
        return Example.of(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def torchvision_networks() -> Iterator[Network]:
    """Yields all classifiers."""
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
        yield Network(name, lambda name=name, options=options: models.get_model(name, weights=None, **options))  # type: ignore[misc]


def pytorchcv_networks() -> Iterator[Network]:
    """Yields one network of each family: the first of those that are called the same up to a number."""
    provider = importlib.import_module("pytorchcv.model_provider")
    families: dict[str, str] = {}
    for name in provider._models:
        families.setdefault(re.split(r"\d", name)[0], name)
    for name in families.values():
        yield Network(name, lambda name=name: provider.get_model(name))  # type: ignore[misc]


def transformers_networks() -> Iterator[Network]:
    """Yields tiny models."""
    library = importlib.import_module("transformers")
    for family, (options, kind) in TRANSFORMERS.items():
        if not hasattr(library, f"{family}Config"):
            continue

        def make(family: str = family, options: dict[str, Any] = options) -> nn.Module:
            config = getattr(library, f"{family}Config")(**options)
            model: nn.Module = getattr(library, f"{family}Model")(config)
            return model

        yield Network(f"{family}Model", make, kind)


SOURCES = {
    "torchvision": torchvision_networks,
    "pytorchcv": pytorchcv_networks,
    "transformers": transformers_networks,
}
