"""What each type of model needs to be made tiny: fields of its configuration, its class, what it reads with a text."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tests.families import VOCABULARY

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"head_dim": 16, "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 0.5}}
_TWO_ROPES = {
    "rope_parameters": {"full_attention": _MROPE["rope_parameters"], "sliding_attention": _ROPE},
    "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2
}
# Image tokens by number, in place of a codec of images.
_CODEC = {"base_channels": 32, "latent_channels": 32, "embed_dim": 8, "channel_multiplier": [1, 1], "resolution": 16,
          "num_embeddings": 16, "codebook_size": 16, "image_token_embed_dim": 32}  # fmt: skip
# Of the models that read a few queries of each image.
QUERIES = {"num_query_tokens": 4, "image_token_index": 97, "video_token_index": 96}
# Layers with keys of their own, with and without a window, and as many that share them.
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
           "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY}
_SHARED_3N = {**_SHARED, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
# Fields that a tiny model of the type needs.
CHANGES: dict[str, dict[str, Any]] = {
    # A window is for all layers or for none.
    **dict.fromkeys(("mistral", "mistral3", "idefics2"), {"sliding_window": None}),
    **dict.fromkeys("glm46v glm4v qwen2_vl qwen2_5_vl qwen2_5_omni_thinker".split(), {"text_config": _MROPE}),
    **dict.fromkeys(("glm4v_moe", "glm_ocr", "glmga"), {"text_config": _HALF_MROPE}),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), QUERIES),
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 97}, "vq_config": _CODEC},
    "cohere_compass": {"text_config": _TWO_ROPES},
    "cohere_compass_text": _TWO_ROPES,
    "dbrx": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "bailing_hybrid": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{name: {"text_config": _SHARED} for name in ("gemma4", "gemma4_unified")},
    "gemma4_unified_text": _SHARED,
    "gemma3n": {"text_config": _SHARED_3N},
    "gemma3n_text": _SHARED_3N,
    "emu3": {
        "vocabulary_map": {"<image>": 97, "<|extra_200|>": 96, "<|visual token 000000|>": 95},
        "vq_config": _CODEC
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    # Their own tower is timm's.
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "perception_lm": {"vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 32}}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    # Heads by layer: fewer for keys where all is seen.
    "gemma4_text": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1],
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4}
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {"vq_config": _CODEC},
    # Heads by layer, of queries.
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"], "num_attention_heads_per_layer": [4, 8]
    },
    "kimi_linear": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "linear_num_heads": 4, "linear_head_dim": 8},
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), {"layer_types": ["conv", "full_attention"]}),
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2, "zero_expert_num": 2,
                      "num_layers": 1, "num_key_value_heads": 4, "head_dim": 4},
    "ministral": {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"projector_hidden_size": 32},
    "muse_spark": {"projector_hidden_size": 32, "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4}},
    "nemotron_h": {"chunk_size": 16},
    "nemotron_h_omni": {
        "chunk_size": 16,
        "projector_hidden_size": 32, "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 16}
    },
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), {"text_config": {"vocab_size": VOCABULARY}}),
    "step3p7": {"text_config": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_hidden_layers": 3, "num_sliding_attention_heads": 8, "sliding_window": 5, "share_expert_dim": 24
    }},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}

# What tells them which tokens attend to later ones; without it `sdpa` and `eager` differ.
WITH_TYPES = ("paligemma",)
# They answer no text alone: with it they read an image, by fields of these names.
WITH_IMAGES = {
    "blip-2": ("pixel_values",),
    "idefics": ("pixel_values", "image_attention_mask"),
    "instructblip": ("pixel_values", "qformer_input_ids"),
    "instructblipvideo": ("pixel_values", "qformer_input_ids"),
}


def class_of(model_type: str) -> Any:
    """The causal language model of this type, or the one that reads images and text."""
    config, found = CONFIG_MAPPING[model_type], []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        one = mapping.get(config, None)
        found += one if isinstance(one, (tuple, list)) else [one] if one else []
    # Of the whole configuration, not of its text part, where there is one.
    return next((one for one in found if one.config_class is config), found[0])
