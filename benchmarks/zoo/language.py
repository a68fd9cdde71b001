"""Encoders, decoders and encoder-decoders of transformers from tiny configs, with dicts that hold the labels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entries import Case, Entry

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
_LLAMA = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 16}
_SHORT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Class -> (config class, options, what the labels are).
_ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertForSequenceClassification": ("BertConfig", _ENCODER, "class"),
    "RobertaForMaskedLM": ("RobertaConfig", _ENCODER, "tokens"),
    "DistilBertForQuestionAnswering": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60, "max_position_embeddings": 64},
        "span",
    ),
    "DebertaV2ForTokenClassification": (
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "token classes",
    ),
    "AlbertForSequenceClassification": ("AlbertConfig", {**_ENCODER, "embedding_size": 16}, "class"),
    "ElectraForTokenClassification": ("ElectraConfig", {**_ENCODER, "embedding_size": 16}, "token classes"),
    "ModernBertForSequenceClassification": ("ModernBertConfig", {**_ENCODER, **_SHORT}, "class"),
}
_DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 64},
        "tokens",
    ),
    "OPTForCausalLM": ("OPTConfig", {**_ENCODER, "ffn_dim": 64, "word_embed_proj_dim": 32}, "tokens"),
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA, "tokens"),
    "Qwen3ForCausalLM": ("Qwen3Config", _LLAMA, "tokens"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _ENCODER, "tokens"),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60}, "tokens"),
    "MixtralForCausalLM": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}, "tokens"),
    "MambaForCausalLM": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
        "tokens",
    ),
}
_PAIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 60, **_SHORT}
        | {"decoder_start_token_id": 0},
        "tokens",
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"d_model": 32, "vocab_size": 60, "max_position_embeddings": 64, **_SHORT, "decoder_start_token_id": 2}
        | {
            f"{part}_{key}": value
            for part in ("encoder", "decoder")
            for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()
        },
        "tokens",
    ),
}


def built(class_name: str, config: str, options: Mapping[str, Any]) -> nn.Module:
    """Returns a model of transformers from a config."""
    library = importlib.import_module("transformers")
    try:
        maker, settings = getattr(library, class_name), getattr(library, config)
    except AttributeError as error:
        raise ImportError(f"this version of transformers has no {class_name}") from error
    model: nn.Module = maker(settings(**options))
    return model


def labelled(model: nn.Module, batch: Callable[[], dict[str, Any]]) -> Case:
    """Returns a model that is called with the batch as keyword arguments, labels included, and returns its loss."""
    return Case(model, [batch(), batch()], lambda model, batch: model(**batch).loss)


def _text(class_name: str, config: str, options: dict[str, Any], target: str) -> Case:
    def batch() -> dict[str, Any]:
        tokens = torch.randint(3, 50, (2, 10))
        mask = torch.ones_like(tokens)
        mask[1, 7:] = 0
        labels: dict[str, dict[str, Any]] = {
            "class": {"labels": torch.tensor([0, 2])},
            "tokens": {"labels": tokens.masked_fill(mask == 0, -100)},
            "token classes": {"labels": torch.randint(0, 3, (2, 10))},
            "span": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        }
        return {"input_ids": tokens, "attention_mask": mask, **labels[target]}

    return labelled(built(class_name, config, options), batch)


def entries() -> Iterator[Entry]:
    """Yields the models."""
    for kind, models in (("text encoders", _ENCODERS), ("text decoders", _DECODERS), ("encoder-decoders", _PAIRS)):
        for name, (config, options, target) in models.items():
            yield Entry(name, "transformers", kind, lambda n=name, c=config, o=options, t=target: _text(n, c, o, t))  # type: ignore[misc]
