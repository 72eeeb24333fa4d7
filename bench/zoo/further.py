"""transformers: further families, beside those of the shelf `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.models import TensorsOut
from bench.zoo.transformers import (
    _BOTH,
    _ENCODER_DECODER,
    _GROUPED,
    _IMAGE,
    _SIZES,
    _TEXT,
    _TOKENS,
    _WIDE,
    Family,
    _causal,
    _two_texts,
    _vision,
    _words,
)

_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
_SPEECH = (
    _TEXT
    | {"conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3}
    | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
)


def _wave() -> tuple[Tensor, ...]:
    return (torch.randn(2, 1600),)


def _speech(model: str, **more: Any) -> Family:
    return Family(model, _SPEECH | more, _wave, ("input_values",))


def _both(model: str, **more: Any) -> Family:
    return Family(model, _ENCODER_DECODER | more, _two_texts, _BOTH)


def _masked(prefix: str, **more: Any) -> Family:
    return Family(f"{prefix}ForMaskedLM", _TEXT | more)


def _series() -> tuple[Tensor, ...]:
    return (torch.randn(2, 32, 3),)


FAMILIES: dict[str, Family] = {
    # encoders of text
    "camembert": _masked("Camembert"),
    "xlm_roberta": _masked("XLMRoberta"),
    "xlm": Family("XLMWithLMHeadModel", {"vocab_size": 256, "emb_dim": 64, "n_layers": 2, "n_heads": 4}),
    "xlnet": Family("XLNetLMHeadModel", {"vocab_size": 256, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}),
    "longformer": _masked("Longformer", attention_window=[4, 4]),
    "funnel": Family(
        "FunnelForSequenceClassification",
        {"vocab_size": 256, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1]},
    ),
    "big_bird": _masked("BigBird", attention_type="original_full"),
    "deberta": Family(
        "DebertaForSequenceClassification", _TEXT | {"relative_attention": True, "pos_att_type": ["p2c"]}
    ),
    "mobilebert": _masked("MobileBert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    "squeezebert": _masked("SqueezeBert", embedding_size=64),
    "convbert": _masked("ConvBert", embedding_size=32),
    "fnet": _masked("FNet"),
    "ibert": _masked("IBert"),
    "layoutlm": _masked("LayoutLM"),
    "megatron_bert": _masked("MegatronBert"),
    "nystromformer": _masked("Nystromformer", num_landmarks=4, segment_means_seq_len=16),
    "rembert": _masked("RemBert", input_embedding_size=32, output_embedding_size=32),
    "roformer": _masked("RoFormer", embedding_size=32),
    "yoso": _masked("Yoso", use_expectation=True),
    "canine": Family(
        "CanineForSequenceClassification", _TEXT | {"num_hash_buckets": 32, "local_transformer_stride": 8}
    ),
    "esm": _masked("Esm", pad_token_id=0, mask_token_id=4),
    "data2vec_text": _masked("Data2VecText"),
    "luke": _masked("Luke", entity_vocab_size=10, entity_emb_size=16),
    "eurobert": _masked("EuroBert", num_key_value_heads=2, pad_token_id=0),
    "perceiver": Family(
        "PerceiverForMaskedLM",
        {"vocab_size": 256, "d_model": 32, "d_latents": 64, "num_latents": 8, "num_blocks": 1}
        | {"num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4}
        | {"max_position_embeddings": 16, "qk_channels": 32, "v_channels": 64},
    ),
    # decoders
    "gpt_bigcode": _causal("GPTBigCode", _TOKENS, n_embd=64, n_head=4, n_layer=2, n_positions=64),
    "codegen": _causal("CodeGen", _TOKENS, n_embd=64, n_head=4, n_layer=2, n_positions=64, n_ctx=64, rotary_dim=8),
    "mpt": _causal("Mpt", {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "biogpt": _causal("BioGpt"),
    "xglm": _causal("XGLM", _TOKENS, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
    "openai_gpt": Family(
        "OpenAIGPTLMHeadModel", _TOKENS | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
    ),
    "ctrl": Family(
        "CTRLLMHeadModel", {"vocab_size": 256, "n_embd": 64, "n_head": 4, "n_layer": 2, "dff": 128, "n_positions": 64}
    ),
    "persimmon": _causal("Persimmon"),
    "olmo": _causal("Olmo", _GROUPED),
    "olmoe": _causal("Olmoe", _GROUPED, num_experts=4, num_experts_per_tok=2),
    "granite": _causal("Granite", _GROUPED),
    "granite_moe": _causal("GraniteMoe", _GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "helium": _causal("Helium", _WIDE),
    "glm": _causal("Glm", _WIDE, pad_token_id=0),
    "glm4": _causal("Glm4", _WIDE, pad_token_id=0),
    "glm4_moe": _causal("Glm4Moe", _WIDE, n_routed_experts=4, **_MOE),
    "smollm3": _causal("SmolLM3", _GROUPED, pad_token_id=0),
    "arcee": _causal("Arcee", _WIDE),
    "apertus": _causal("Apertus", _GROUPED),
    "seed_oss": _causal("SeedOss", _WIDE),
    "ernie4_5": _causal("Ernie4_5", _WIDE),
    "exaone4": _causal("Exaone4", _GROUPED),
    "hunyuan_dense": _causal("HunYuanDenseV1", _WIDE),
    "nemotron": _causal("Nemotron", _WIDE),
    "cohere2": _causal("Cohere2", _GROUPED),
    "qwen2_moe": _causal("Qwen2Moe", _GROUPED, num_experts=4, shared_expert_intermediate_size=64, **_MOE),
    "qwen3_next": _causal(
        "Qwen3Next",
        _WIDE,
        num_experts=4,
        shared_expert_intermediate_size=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        **_MOE,
    ),
    "gpt_oss": _causal("GptOss", _WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "deepseek_v2": _causal("DeepseekV2", _TEXT, n_routed_experts=4, first_k_dense_replace=1, **_MOE, **_LATENT),
    "deepseek_v3": _causal(
        "DeepseekV3", _TEXT, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, **_MOE, **_LATENT
    ),
    "phimoe": _causal("Phimoe", _GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": _causal("JetMoe", _TEXT, num_key_value_heads=2, kv_channels=16, num_local_experts=4),
    "minimax": _causal("MiniMax", _WIDE, num_local_experts=4, block_size=8),
    "switch": Family(
        "SwitchTransformersForConditionalGeneration",
        _TOKENS | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "num_experts": 4},
        _two_texts,
        _BOTH,
    ),
    # state spaces, linear attention, and both with attention
    "falcon_mamba": _causal("FalconMamba"),
    "jamba": _causal(
        "Jamba", _GROUPED, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    "bamba": _causal("Bamba", _GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8),
    "recurrent_gemma": _causal("RecurrentGemma", _GROUPED, attention_window_size=8, lru_width=64),
    "lfm2": _causal("Lfm2", _GROUPED, layer_types=["conv", "full_attention"]),
    # encoders with decoders
    "m2m_100": _both("M2M100ForConditionalGeneration"),
    "pegasus": _both("PegasusForConditionalGeneration"),
    "marian": _both("MarianMTModel", pad_token_id=0, decoder_start_token_id=0),
    "mbart": _both("MBartForConditionalGeneration"),
    "blenderbot": _both("BlenderbotForConditionalGeneration"),
    "led": _both("LEDForConditionalGeneration", attention_window=[4, 4], max_encoder_position_embeddings=64),
    "prophetnet": Family(
        "ProphetNetForConditionalGeneration",
        _TOKENS
        | {"hidden_size": 64, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
        | {"num_encoder_layers": 2, "num_decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
        _two_texts,
        _BOTH,
    ),
    "longt5": Family(
        "LongT5ForConditionalGeneration",
        _TOKENS | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "local_radius": 4},
        _two_texts,
        _BOTH,
    ),
    "umt5": Family(
        "UMT5ForConditionalGeneration",
        _TOKENS | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        _two_texts,
        _BOTH,
    ),
    # images
    "beit": _vision("BeitForImageClassification", _IMAGE),
    "data2vec_vision": _vision("Data2VecVisionForImageClassification", _IMAGE),
    "dinov2_registers": _vision("Dinov2WithRegistersForImageClassification", _IMAGE),
    "dinov3_vit": _vision("DINOv3ViTModel", _IMAGE),
    "dpt": _vision(
        "DPTForDepthEstimation",
        _IMAGE
        | {
            "neck_hidden_sizes": [16, 16, 16, 16],
            "fusion_hidden_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
        },
        32,
    ),
    "efficientnet": _vision(
        "EfficientNetForImageClassification",
        {"image_size": 64, "hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.3},
        64,
    ),
    "mobilenet_v2": _vision("MobileNetV2ForImageClassification", {"image_size": 64, "depth_multiplier": 0.25}, 64),
    "mobilevit": _vision(
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
            "num_attention_heads": 2,
        },
        64,
    ),
    "levit": _vision(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "key_dim": [8, 8, 8],
            "depths": [1, 1, 1],
        },
        64,
    ),
    "poolformer": _vision(
        "PoolFormerForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, 64
    ),
    "pvt_v2": _vision(
        "PvtV2ForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
        64,
    ),
    "regnet": _vision(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
        64,
    ),
    "resnet": _vision(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        64,
    ),
    "swinv2": _vision(
        "Swinv2ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "swin2sr": _vision(
        "Swin2SRForImageSuperResolution",
        {
            "image_size": 16,
            "patch_size": 1,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "upscale": 2,
        },
        16,
    ),
    "convnextv2": _vision(
        "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
    ),
    "focalnet": _vision(
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    "glpn": _vision(
        "GLPNForDepthEstimation",
        {
            "num_attention_heads": [1, 2, 3, 4],
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 16,
        },
        64,
    ),
    "hiera": _vision(
        "HieraForImageClassification", {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1]}, 64
    ),
    "vit_mae": _vision("ViTMAEModel", _IMAGE | {"mask_ratio": 0.0}),
    "vit_msn": _vision("ViTMSNForImageClassification", _IMAGE),
    "vitdet": _vision("VitDetModel", _IMAGE | {"window_size": 2}),
    "yolos": _vision("YolosForObjectDetection", _IMAGE | {"image_size": [32, 32], "num_detection_tokens": 5}),
    "ijepa": _vision("IJepaForImageClassification", _IMAGE),
    "upernet": _vision(
        "UperNetForSemanticSegmentation", {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_channels": 16}, 64
    ),
    "mask2former": _vision(
        "Mask2FormerForUniversalSegmentation",
        {
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "num_attention_heads": 4,
            "dim_feedforward": 64,
            "encoder_feedforward_dim": 64,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_queries": 8,
        },
        64,
    ),
    "conditional_detr": _vision("ConditionalDetrForObjectDetection", {}, 64),
    "deformable_detr": _vision("DeformableDetrForObjectDetection", {}, 64),
    "rt_detr": _vision("RTDetrForObjectDetection", {"num_queries": 20}, 64),
    "sam": _vision(
        "SamVisionModel",
        _IMAGE
        | {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_dim": 128},
    ),
    "superpoint": Family(
        "SuperPointForKeypointDetection",
        {"encoder_hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32, "descriptor_decoder_dim": 32},
        lambda: (torch.randn(1, 3, 32, 32),),
        ("pixel_values",),
    ),
    "timesformer": Family(
        "TimesformerForVideoClassification",
        _IMAGE | {"num_frames": 2},
        lambda: (torch.randn(2, 2, 3, 32, 32),),
        ("pixel_values",),
    ),
    "videomae": Family(
        "VideoMAEForVideoClassification",
        _IMAGE | {"num_frames": 4},
        lambda: (torch.randn(2, 4, 3, 32, 32),),
        ("pixel_values",),
    ),
    "vivit": Family(
        "VivitForVideoClassification",
        _IMAGE | {"num_frames": 4, "tubelet_size": [2, 8, 8]},
        lambda: (torch.randn(2, 4, 3, 32, 32),),
        ("pixel_values",),
    ),
    # images with text
    "blip": Family(
        "BlipForConditionalGeneration",
        {
            "text_config": _TEXT | {"encoder_hidden_size": 64, "pad_token_id": 0, "sep_token_id": 2},
            "vision_config": _IMAGE,
            "projection_dim": 32,
        },
        lambda: (torch.randn(2, 3, 32, 32), _words(8)),
        ("pixel_values", "input_ids"),
    ),
    "owlvit": Family(
        "OwlViTModel",
        {"text_config": _TEXT | {"max_position_embeddings": 16}, "vision_config": _IMAGE, "projection_dim": 32},
        lambda: (_words(16), torch.randn(2, 3, 32, 32)),
        ("input_ids", "pixel_values"),
    ),
    "vilt": Family(
        "ViltForQuestionAnswering",
        _TEXT | _IMAGE,
        lambda: (_words(16), torch.randn(2, 3, 32, 32)),
        ("input_ids", "pixel_values"),
    ),
    "siglip": Family(
        "SiglipModel",
        {"text_config": _TEXT, "vision_config": _IMAGE},
        lambda: (_words(16), torch.randn(2, 3, 32, 32)),
        ("input_ids", "pixel_values"),
    ),
    "align": Family("AlignTextModel", _TEXT),
    "chinese_clip": Family("ChineseCLIPVisionModel", _IMAGE, lambda: (torch.randn(2, 3, 32, 32),), ("pixel_values",)),
    # sound
    "hubert": _speech("HubertForCTC"),
    "wavlm": _speech("WavLMForCTC"),
    "unispeech": _speech("UniSpeechForCTC", num_ctc_classes=10),
    "unispeech_sat": _speech("UniSpeechSatForCTC", num_ctc_classes=10),
    "data2vec_audio": _speech("Data2VecAudioForCTC"),
    "wav2vec2_conformer": _speech("Wav2Vec2ConformerForCTC"),
    "sew": _speech("SEWForCTC", squeeze_factor=2),
    "sew_d": _speech("SEWDForCTC", squeeze_factor=2),
    "wav2vec2_bert": Family(
        "Wav2Vec2BertForCTC",
        _TEXT | {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3},
        lambda: (torch.randn(2, 20, 16),),
        ("input_features",),
    ),
    "audio_spectrogram": Family(
        "ASTForAudioClassification",
        _SIZES | {"patch_size": 8, "max_length": 64, "num_mel_bins": 32},
        lambda: (torch.randn(2, 64, 32),),
        ("input_values",),
    ),
    "speech_to_text": Family(
        "Speech2TextForConditionalGeneration",
        _ENCODER_DECODER
        | {
            "max_source_positions": 64,
            "max_target_positions": 64,
            "input_feat_per_channel": 16,
            "conv_channels": 64,
            "num_hidden_layers": 2,
        },
        lambda: (torch.randn(2, 32, 16), _words(8)),
        ("input_features", "decoder_input_ids"),
    ),
    "speecht5": Family(
        "SpeechT5ForSpeechToText",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "conv_dim": [32, 32, 32],
            "conv_stride": [5, 2, 2],
            "conv_kernel": [10, 3, 3],
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        lambda: (torch.randn(2, 1600), _words(8)),
        ("input_values", "decoder_input_ids"),
    ),
    "moonshine": Family(
        "MoonshineForConditionalGeneration",
        _TOKENS
        | _SIZES
        | {
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
        },
        lambda: (torch.randn(2, 4000), _words(8)),
        ("input_values", "decoder_input_ids"),
    ),
    "clap": Family("ClapTextModel", _TEXT),
    "encodec": Family(
        "EncodecModel",
        {
            "num_filters": 8,
            "hidden_size": 16,
            "num_lstm_layers": 1,
            "codebook_size": 16,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
        },
        lambda: (torch.randn(2, 1, 640),),
        ("input_values",),
    ),
    "mimi": Family(
        "MimiModel",
        _SIZES
        | {
            "num_filters": 8,
            "codebook_size": 16,
            "codebook_dim": 64,
            "upsample_groups": 64,
            "vector_quantization_hidden_dimension": 64,
            "num_quantizers": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "upsampling_ratios": [4, 2],
        },
        lambda: (torch.randn(2, 1, 1920),),
        ("input_values",),
    ),
    "dac": Family(
        "DacModel",
        {
            "encoder_hidden_size": 8,
            "decoder_hidden_size": 64,
            "downsampling_ratios": [2, 4],
            "upsampling_ratios": [4, 2],
            "n_codebooks": 2,
            "codebook_size": 16,
            "codebook_dim": 4,
            "hidden_size": 32,
        },
        lambda: (torch.randn(2, 1, 640),),
        ("input_values",),
    ),
    "univnet": Family(
        "UnivNetModel",
        {
            "model_in_channels": 16,
            "model_hidden_channels": 8,
            "num_mel_bins": 16,
            "kernel_predictor_hidden_channels": 16,
        },
        lambda: (torch.randn(2, 8, 16), torch.randn(2, 8, 16)),
        ("input_features", "noise_sequence"),
    ),
    "vits": Family(
        "VitsModel",
        {
            "vocab_size": 256,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "flow_size": 32,
            "spectrogram_bins": 32,
            "upsample_initial_channel": 64,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "prior_encoder_num_wavenet_layers": 2,
            "noise_scale": 0.0,
        },
    ),
    "speecht5_hifigan": Family(
        "SpeechT5HifiGan",
        {
            "model_in_dim": 16,
            "upsample_initial_channel": 64,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
        },
        lambda: (torch.randn(2, 20, 16),),
        ("spectrogram",),
    ),
    # series
    "patchtst": Family(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "ffn_dim": 128,
            "prediction_length": 8,
        },
        _series,
        ("past_values",),
    ),
    "patchtsmixer": Family(
        "PatchTSMixerForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_layers": 2,
            "prediction_length": 8,
        },
        _series,
        ("past_values",),
    ),
    "timesfm": Family(
        "TimesFmModel",
        _SIZES | {"patch_length": 8, "context_length": 32, "head_dim": 16},
        lambda: (torch.randn(2, 32), torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)),
        ("past_values", "past_values_padding", "freq"),
    ),
    "decision_transformer": Family(
        "DecisionTransformerGPT2Model", _TOKENS | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
    ),
}
NAMES = tuple(FAMILIES)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the family's model, its first result as a tensor, and inputs."""
    import transformers

    family = FAMILIES[name]
    model_class = getattr(transformers, family.model)
    config = model_class.config_class(**family.settings)
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return TensorsOut(model_class(config).eval(), family.takes), family.inputs()
