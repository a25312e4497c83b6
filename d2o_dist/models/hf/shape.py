"""The shape of a Hugging Face model, read from its configuration."""

from __future__ import annotations

from typing import Any

from d2o_dist.models.hf.guards import attending, layer_windows, rope_types, sharers, state_counts, text_config
from d2o_dist.models.hf.rope import rope_border
from d2o_dist.models.hf.supported import cuts_prompts
from d2o_dist.models.shape import ModelShape

# Set on the configuration of a model whose KV heads were copied, so that every tensor rank has one.
KV_REPLICAS = "d2o_kv_replicas"


def num_kv_heads(config: Any) -> int:
    """KV heads of the whole model; models without the field have one for each query head."""
    config = text_config(config)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def shape_of(model_config: Any) -> ModelShape:
    """The shape of the decoder.

    Raises:
        ValueError: encoder-decoder models, or layers of an unsupported kind.
    """
    config = text_config(model_config)
    heads = config.num_attention_heads
    return ModelShape(
        windows=tuple(layer_windows(config)),
        num_heads=heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=_head_dim(config) or config.hidden_size // heads,
        kv_replicas=getattr(config, KV_REPLICAS, 1),
        vocab_size=getattr(config, "vocab_size", None),
        max_positions=getattr(config, "max_position_embeddings", None),
        border=rope_border(model_config),
        has_dynamic_rope=any("dynamic" in kind for kind in rope_types(config)),
        has_states=any(state_counts(config)),
        looks=tuple(attending(config).index(owner) for owner in sharers(config).values()),
        cuts_prompts=cuts_prompts(config),
        source=getattr(model_config, "name_or_path", None) or None,
        revision=getattr(model_config, "_commit_hash", None),
    )


def _head_dim(config: Any) -> int | None:
    """What the configuration says; of layers that differ, the largest."""
    if "head_dim" in (getattr(config, "per_layer_attributes", None) or ()):
        return max(layer.head_dim for layer in config.per_layer_config)
    return getattr(config, "head_dim", None)
