"""Configurations of Hugging Face's Llama, Mistral, Qwen2 and Qwen3 as arguments of a Megatron model, and back."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from d2o_dist.config.megatron import MegatronArguments
from d2o_dist.models.hf.shape import shape_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# The rule of Llama 3, as Megatron has it fixed.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What all families have in common.
_COMMON = {"normalization": "RMSNorm", "activation_func": "silu", "gated_linear_unit": True, "add_bias_linear": False,
           "position_embedding_type": "rope"}  # fmt: skip
# Ours, and theirs.
_RENAMED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
# What none of them has.
_FOREIGN = ("layernorm_zero_centered_gamma", "softmax_scale", "rotary_percent", "rotary_interleaved",
            "seq_len_interpolation_factor", "num_moe_experts")  # fmt: skip


def arguments_of(config: Any) -> MegatronArguments:
    """The arguments of a Megatron model of the shape of a Hugging Face configuration.

    Raises:
        ValueError: a family, a rotary embedding, biases or sliding windows that are not converted.
    """
    shape = shape_of(config)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type ({config.model_type}) must be one of {', '.join(FAMILIES)}")
    windows = set(shape.windows) - {None}
    if len(windows) > 1:
        raise ValueError(f"sliding windows of several sizes ({sorted(windows)}) are not converted")
    rope = dict(config.rope_parameters)
    scaled = rope.get("rope_type", "default") == "llama3"
    if rope.get("rope_type", "default") != "default" and not (
        scaled and all(rope.get(name) == value for name, value in _LLAMA3.items())
    ):
        raise ValueError(f"rope_parameters ({rope}) must be of rope_type default, or llama3 with {_LLAMA3}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{name} (True) is not converted: only biases of queries, keys and values are")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act ({config.hidden_act}) must be silu")
    size, eos = next(iter(windows), None), config.eos_token_id
    return MegatronArguments(
        **_COMMON,
        **{ours: getattr(config, theirs) for ours, theirs in _RENAMED.items()},
        ffn_hidden_size=config.intermediate_size,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=config.model_type == "qwen3",
        add_qkv_bias=config.model_type == "qwen2",
        window_size=None if size is None else (size - 1, 0),
        window_attn_skip_freq=tuple(int(window is not None) for window in shape.windows) if windows else None,
        rotary_base=rope["rope_theta"],
        rope_scaling=scaled,
        rope_scaling_factor=rope.get("factor", 8.0),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def config_of(arguments: MegatronArguments) -> Any:
    """The Hugging Face configuration of a Megatron model: of Qwen3 where queries and keys have norms, of Qwen2 where
    they have biases, of Mistral where all layers have windows, else of Llama.

    Raises:
        ValueError: arguments that none of these families has.
    """
    plain = {name: MegatronArguments.__dataclass_fields__[name].default for name in _FOREIGN}
    for name, wanted in {**_COMMON, **plain}.items():
        if getattr(arguments, name) != wanted:
            raise ValueError(f"{name} ({getattr(arguments, name)}) must be {wanted}, as in {', '.join(FAMILIES)}")
    if arguments.qk_layernorm and arguments.add_qkv_bias:
        raise ValueError(f"qk_layernorm and add_qkv_bias are both true: none of {', '.join(FAMILIES)} has both")
    kind = LlamaConfig
    windows, own = arguments.windows, {}
    size = next((window for window in windows if window is not None), None)
    if arguments.qk_layernorm or arguments.add_qkv_bias:
        kind = Qwen3Config if arguments.qk_layernorm else Qwen2Config
        layers = ["full_attention" if window is None else "sliding_attention" for window in windows]
        own = {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": layers}
    elif size is not None:
        if None in windows:
            raise ValueError("window_size is of some layers only, without norms or biases of queries and keys: none of "
                             f"{', '.join(FAMILIES)} has such layers")  # fmt: skip
        kind, own = MistralConfig, {"sliding_window": size}
    wide = arguments.head_dim * arguments.num_attention_heads
    if kind is Qwen2Config and wide != arguments.hidden_size:
        raise ValueError(f"with add_qkv_bias, kv_channels x num_attention_heads ({wide}) must be hidden_size "
                         f"({arguments.hidden_size})")  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(arguments.rotary_base)}
    if arguments.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": arguments.rope_scaling_factor, **_LLAMA3}
    eos = arguments.eos_token_ids
    return kind(
        **{theirs: getattr(arguments, ours) for ours, theirs in _RENAMED.items()},
        intermediate_size=arguments.ffn_hidden_size or 4 * arguments.hidden_size,
        num_key_value_heads=arguments.query_groups,
        head_dim=arguments.head_dim,
        rope_parameters=rope,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=list(eos) if len(eos) > 1 else eos[0] if eos else None,
        **own,
    )
