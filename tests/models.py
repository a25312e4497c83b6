"""Tiny random models of every supported family: structure without weights worth downloading."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 89

# Weights larger than usual, so that attention is far from uniform and selections are never close calls.
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.25,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)

_FULL = ["full_attention"] * 4
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_sliding": (
        MinistralConfig,
        MinistralForCausalLM,
        {"head_dim": 16, "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}

# Those whose attention is more than a softmax of scaled products: `tests/hf/test_softmaxes.py`. Layers without windows,
# as the oracle wants them; `windowed` is what they have in earnest.
OTHERS = {
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        # A cap that bends most logits.
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0, "layer_types": _FULL},
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _FULL,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "mimo": (
        MiMoV2FlashConfig,
        MiMoV2FlashForCausalLM,
        # Windowed layers have sinks, and twice the KV heads.
        {"head_dim": 24, "v_head_dim": 16, "layer_types": _FULL, "mlp_layer_types": ["dense"] * 4},
    ),
    "granite_swa": (GraniteSWAConfig, GraniteSWAForCausalLM, {"layer_types": _FULL}),
    # Latents of 12, and 4 rotated elements of a key that has 6 more; values of 10.
    "deepseek": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {"num_key_value_heads": 4, "first_k_dense_replace": 4, "n_routed_experts": 4, "q_lora_rank": 16,
         "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10},
    ),
}  # fmt: skip

# Layers that attend in chunks, and others without rope, whose queries grow with the text: `tests/hf/test_chunked.py`.
CHUNKED = {
    "llama4": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {"head_dim": 16, "intermediate_size_mlp": 96, "moe_layers": [],
         "attention_chunk_size": 24, "no_rope_layers": [1, 0, 1, 0], "floor_scale": 7, "attn_scale": 0.5},
    ),
}  # fmt: skip

# Layers that attend to keys of others: `tests/hf/test_shared.py`. A full layer with two, a windowed one with one.
_PER_LAYER = {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 6, "num_kv_shared_layers": 3,
              "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
              "layer_types": ["full_attention", "sliding_attention", "full_attention",
                              "full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
SHARED = {
    "gemma3n": (
        Gemma3nTextConfig,
        Gemma3nForCausalLM,
        {**_PER_LAYER, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    ),
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM, {**_PER_LAYER, "global_head_dim": 16}),
}


def windowed(family: str) -> dict[str, Any]:
    """Overrides of `tiny_model`: every other layer of the family has a window, if layers of its can have one."""
    assert family in OTHERS
    if family == "deepseek":
        return {}
    return {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}


def tiny_model(family: str = "llama", *, attention: str = "d2o", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of `family` in float64, in evaluation mode. The same seed gives the same weights."""
    config_class, model_class, extra = {**FAMILIES, **OTHERS, **CHUNKED, **SHARED}[family]
    torch.manual_seed(seed)
    values = {**_COMMON, **extra, **overrides}
    for name in ("layer_types", "mlp_layer_types"):
        if name in values:
            values[name] = values[name][: values["num_hidden_layers"]]
    config = config_class(**values)
    config._attn_implementation, config._experts_implementation = attention, "eager"
    model = model_class(config)
    for module in model.modules():
        if getattr(module, "sinks", None) is not None:
            module.sinks.data += 2.0  # a share that shows
    return model.double().eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of which is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`(input_ids, attention_mask)` of rows of these lengths, padded on the left."""
    width = max(lengths)
    ids = tokens(len(lengths), width, seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


@torch.no_grad()
def generated(model, ids, mask, **given):
    """Logits [B, 30, V] of greedy tokens, and all tokens."""
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, min_new_tokens=30, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **given,
    )  # fmt: skip
    return torch.stack(output.logits, 1), output.sequences
