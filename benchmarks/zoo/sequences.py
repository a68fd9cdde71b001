"""Vision, detection, audio and time series of transformers from tiny configs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.zoo.entries import Case, Entry
from benchmarks.zoo.language import built, labelled

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 8,
    "num_labels": 4,
}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 20,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}


def _images(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])}


def _segformer() -> Case:
    options = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}
    model = built("SegformerForSemanticSegmentation", "SegformerConfig", {**options, "decoder_hidden_size": 32})
    return labelled(
        model, lambda: {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(0, 2, (2, 64, 64))}
    )


def _detection(name: str) -> Case:
    library = importlib.import_module("transformers")
    if name == "YolosForObjectDetection":
        model = built(name, "YolosConfig", {**_VIT, "image_size": [64, 64], "num_detection_tokens": 6})
    elif name == "RTDetrForObjectDetection":
        backbone = library.RTDetrResNetConfig(**_RESNET, out_features=["stage2", "stage3", "stage4"])
        options = {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "num_labels": 4}
        sizes = {"encoder_in_channels": [32, 32, 64], "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 8}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2, "num_denoising": 4}
        model = built(name, "RTDetrConfig", {**options, **sizes, **heads, "backbone_config": backbone})
    else:
        backbone = library.ResNetConfig(**_RESNET, out_features=["stage4"])
        plain = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        model = built(
            name, name.replace("ForObjectDetection", "Config"), {**_DETR, **plain, "backbone_config": backbone}
        )

    def batch() -> dict[str, Any]:
        labels = [
            {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.4, 0.4, 0.3, 0.4], [0.6, 0.5, 0.5, 0.5]])},
            {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.6, 0.4]])},
        ]
        return {"pixel_values": torch.randn(2, 3, 64, 64), "labels": labels}

    return labelled(model, batch)


def _clip() -> Case:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    options = {"text_config": {**text, **sizes}, "vision_config": _VIT, "projection_dim": 16}
    model = built("CLIPModel", "CLIPConfig", options)
    return labelled(
        model,
        lambda: {
            "input_ids": torch.randint(3, 50, (2, 8)),
            "pixel_values": torch.randn(2, 3, 32, 32),
            "return_loss": True,
        },
    )


def _vilt() -> Case:
    model = built("ViltForQuestionAnswering", "ViltConfig", {**_VIT, "vocab_size": 60, "max_image_length": 16})
    return labelled(
        model,
        lambda: {
            "input_ids": torch.randint(3, 50, (2, 8)),
            "pixel_values": torch.randn(2, 3, 32, 32),
            "labels": torch.rand(2, 3),
        },
    )


def _speech(name: str) -> Case:
    model = built(name, name.replace("ForCTC", "Config"), _SPEECH)
    return labelled(model, lambda: {"input_values": torch.randn(2, 800), "labels": torch.randint(1, 20, (2, 4))})


def _whisper() -> Case:
    options = {
        "d_model": 32,
        "vocab_size": 60,
        "num_mel_bins": 16,
        "max_source_positions": 32,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    parts = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
    options |= {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in parts.items()}
    model = built("WhisperForConditionalGeneration", "WhisperConfig", options)
    return labelled(model, lambda: {"input_features": torch.randn(2, 16, 64), "labels": torch.randint(3, 50, (2, 6))})


def _spectrogram() -> Case:
    options = {**_VIT, "patch_size": 8, "max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8}
    model = built("ASTForAudioClassification", "ASTConfig", options)
    return labelled(model, lambda: {"input_values": torch.randn(2, 64, 32), "labels": torch.tensor([0, 2])})


def _series(name: str) -> Case:
    options = {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    model = built(name, name.replace("ForPrediction", "Config"), options)

    def batch() -> dict[str, Any]:
        return {
            "past_values": torch.rand(2, 10),
            "past_time_features": torch.rand(2, 10, 1),
            "past_observed_mask": torch.ones(2, 10),
            "future_values": torch.rand(2, 4),
            "future_time_features": torch.rand(2, 4, 1),
        }

    return labelled(model, batch)


def _patches(name: str) -> Case:
    options = {
        "num_input_channels": 2,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "prediction_length": 4,
        "d_model": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    model = built(name, name.replace("ForPrediction", "Config"), options)
    return labelled(model, lambda: {"past_values": torch.rand(2, 32, 2), "future_values": torch.rand(2, 4, 2)})


def entries() -> Iterator[Entry]:
    """Yields the models."""

    def entry(name: str, kind: str, make: Callable[[], Case]) -> Entry:
        return Entry(name, "transformers", kind, make)

    small = {
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 2,
    }
    stages = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3}
    for name, config, options in (
        ("ViTForImageClassification", "ViTConfig", _VIT),
        ("SwinForImageClassification", "SwinConfig", {**small, "num_labels": 3}),
        ("Dinov2ForImageClassification", "Dinov2Config", _VIT),
        ("BeitForImageClassification", "BeitConfig", {**_VIT, "use_relative_position_bias": True}),
    ):
        yield entry(
            name, "vision transformers", lambda n=name, c=config, o=options: labelled(built(n, c, o), _images())
        )  # type: ignore[misc]
    yield entry(
        "ConvNextV2ForImageClassification",
        "image classifiers",
        lambda: labelled(built("ConvNextV2ForImageClassification", "ConvNextV2Config", stages), _images(64)),
    )
    yield entry("SegformerForSemanticSegmentation", "segmentation", _segformer)
    for name in (
        "DetrForObjectDetection",
        "ConditionalDetrForObjectDetection",
        "RTDetrForObjectDetection",
        "YolosForObjectDetection",
    ):
        yield entry(name, "detection", lambda n=name: _detection(n))  # type: ignore[misc]
    yield entry("CLIPModel", "vision and text", _clip)
    yield entry("ViltForQuestionAnswering", "vision and text", _vilt)
    for name in ("Wav2Vec2ForCTC", "HubertForCTC"):
        yield entry(name, "audio", lambda n=name: _speech(n))  # type: ignore[misc]
    yield entry("WhisperForConditionalGeneration", "audio", _whisper)
    yield entry("ASTForAudioClassification", "audio", _spectrogram)
    for name in ("TimeSeriesTransformerForPrediction", "InformerForPrediction"):
        yield entry(name, "time series", lambda n=name: _series(n))  # type: ignore[misc]
    for name in ("PatchTSTForPrediction", "PatchTSMixerForPrediction"):
        yield entry(name, "time series", lambda n=name: _patches(n))  # type: ignore[misc]
