"""transformers: one small model of each of many families, two layers of four heads and 64 channels where it allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import TensorsOut

Inputs = Callable[[], tuple[Tensor, ...]]
_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {k: _TEXT[k] for k in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")}
_SIZES = {k: _TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 16}
_IMAGE = _SIZES | {"image_size": 32, "patch_size": 8}
_ENCODER_DECODER = _TOKENS | {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}


def _words(length: int = 16) -> Tensor:
    return torch.randint(3, 250, (2, length))


def _text() -> tuple[Tensor, ...]:
    return (_words(),)


def _two_texts() -> tuple[Tensor, ...]:
    return _words(), _words(8)


def _image(size: int = 32) -> Inputs:
    return lambda: (torch.randn(2, 3, size, size),)


@dataclass(frozen=True, slots=True)
class Family:
    """The model class, what differs from the class's own configuration, and inputs by the names of `takes`."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = _text
    takes: tuple[str, ...] = ("input_ids",)


def _causal(prefix: str, settings: dict[str, Any] | None = None, **more: Any) -> Family:
    return Family(f"{prefix}ForCausalLM", (_TEXT if settings is None else settings) | more)


def _vision(model: str, settings: dict[str, Any], size: int = 32) -> Family:
    return Family(model, settings, _image(size), ("pixel_values",))


_BOTH = ("input_ids", "decoder_input_ids")
_STAGES = {"hidden_sizes": [16, 32, 48, 64]}

FAMILIES: dict[str, Family] = {
    # encoders of text
    "bert": Family("BertForSequenceClassification", _TEXT),
    "roberta": Family("RobertaForMaskedLM", _TEXT),
    "distilbert": Family(
        "DistilBertForQuestionAnswering", _TOKENS | {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2}
    ),
    "albert": Family("AlbertForMaskedLM", _TEXT | {"embedding_size": 32}),
    "electra": Family("ElectraForMaskedLM", _TEXT | {"embedding_size": 32}),
    "deberta_v2": Family(
        "DebertaV2ForSequenceClassification",
        _TEXT | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": Family("MPNetForMaskedLM", _TEXT),
    "modernbert": Family(
        "ModernBertForMaskedLM", _TEXT | {"local_attention": 8, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    ),
    # decoders
    "gpt2": Family("GPT2LMHeadModel", _TOKENS | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt_neo": _causal(
        "GPTNeo",
        _TOKENS | {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4},
        attention_types=[[["global", "local"], 1]],
    ),
    "gptj": _causal("GPTJ", _TOKENS, n_embd=64, n_head=4, n_layer=2, n_positions=64, rotary_dim=8),
    "gpt_neox": _causal("GPTNeoX"),
    "opt": _causal("OPT", ffn_dim=128, word_embed_proj_dim=64),
    "bloom": _causal("Bloom", _TOKENS, hidden_size=64, n_layer=2, n_head=4),
    "falcon": _causal("Falcon", new_decoder_architecture=False, multi_query=True),
    "llama": _causal("Llama", _GROUPED),
    "mistral": _causal("Mistral", _GROUPED),
    "mixtral": _causal("Mixtral", _GROUPED, num_local_experts=4),
    "qwen2": _causal("Qwen2", _GROUPED),
    "qwen3": _causal("Qwen3", _WIDE),
    "qwen3_moe": _causal("Qwen3Moe", _WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gemma": _causal("Gemma", _WIDE),
    "gemma2": _causal("Gemma2", _WIDE),
    "gemma3": _causal("Gemma3", _WIDE),
    "phi": _causal("Phi", _GROUPED),
    "phi3": _causal("Phi3", _GROUPED, pad_token_id=0),
    "olmo2": _causal("Olmo2", _GROUPED),
    "starcoder2": _causal("Starcoder2", _GROUPED),
    "stablelm": _causal("StableLm", _GROUPED),
    "cohere": _causal("Cohere", _GROUPED),
    # state spaces and linear attention
    "mamba": _causal("Mamba"),
    "mamba2": _causal("Mamba2", num_heads=8, head_dim=16, n_groups=2),
    "rwkv": _causal("Rwkv"),
    # encoders with decoders
    "t5": Family(
        "T5ForConditionalGeneration",
        _TOKENS | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        _two_texts,
        _BOTH,
    ),
    "bart": Family("BartForConditionalGeneration", _ENCODER_DECODER, _two_texts, _BOTH),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        _ENCODER_DECODER
        | {"max_source_positions": 32, "num_mel_bins": 16, "pad_token_id": 0, "decoder_start_token_id": 1},
        lambda: (torch.randn(2, 16, 64), _words()),
        ("input_features", "decoder_input_ids"),
    ),
    # images, sound, and both with text
    "vit": _vision("ViTForImageClassification", _IMAGE),
    "deit": _vision("DeiTForImageClassification", _IMAGE),
    "dinov2": _vision("Dinov2ForImageClassification", _IMAGE),
    "siglip_vision": _vision("SiglipVisionModel", _IMAGE),
    "swin": _vision(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": _vision("ConvNextForImageClassification", _STAGES | {"depths": [1, 1, 2, 1]}),
    "segformer": _vision(
        "SegformerForSemanticSegmentation", _STAGES | {"depths": [1, 1, 1, 1], "decoder_hidden_size": 32}, 64
    ),
    "clip": Family(
        "CLIPModel",
        {
            "text_config": _TEXT | {"projection_dim": 32},
            "vision_config": _IMAGE | {"projection_dim": 32},
            "projection_dim": 32,
        },
        lambda: (_words(), torch.randn(2, 3, 32, 32)),
        ("input_ids", "pixel_values"),
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC",
        _TEXT
        | {"conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        lambda: (torch.randn(2, 1600),),
        ("input_values",),
    ),
    "detr": _vision(
        "DetrForObjectDetection",
        {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 10}
        | {k: 1 if "layers" in k else v for k, v in _ENCODER_DECODER.items() if k not in _TOKENS},
        64,
    ),
}  # fmt: skip
NAMES = tuple(FAMILIES)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the family's model, its first result as a tensor, and inputs."""
    import transformers

    family = FAMILIES[name]
    model_class = getattr(transformers, family.model)
    settings = dict(family.settings)
    if name == "detr":
        sizes = {"embedding_size": 16, **_STAGES, "depths": [1, 1, 1, 1], "layer_type": "basic"}
        settings["backbone_config"] = transformers.ResNetConfig(**sizes, out_features=["stage4"])
    config = model_class.config_class(**settings)
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return TensorsOut(model_class(config).eval(), family.takes), family.inputs()
