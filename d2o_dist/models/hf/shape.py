"""The shape of a Hugging Face model, read from its configuration."""

from __future__ import annotations

from typing import Any

from d2o_dist.models.hf.guards import (
    attending,
    latent_dim,
    layer_types,
    layer_windows,
    rope_types,
    sharers,
    state_counts,
    text_config,
)
from d2o_dist.models.hf.per_layer import of_each_layer, of_layers
from d2o_dist.models.hf.rope import rope_border
from d2o_dist.models.hf.supported import ATTENTION, CHUNKED, INSTEAD, WINDOWED, cuts_prompts
from d2o_dist.models.shape import ModelShape

# Set on the configuration of a model whose KV heads were copied, so that every tensor rank has one.
KV_REPLICAS = "d2o_kv_replicas"
_NOT_FULL = (CHUNKED, *WINDOWED)
# Fields that say how many heads a layer has, and of which size.
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def layer_heads(config: Any) -> list[tuple[int, int]]:
    """(query heads, KV heads) of the whole model, each once: first of layers with full attention, then of others.

    Models without KV heads in their configuration have one for each query head, latent attention has one.

    Raises:
        ValueError: layers with full attention that differ in these.
    """
    config = text_config(config)
    _check_alike(config)
    if latent_dim(config) is not None:
        return [(config.num_attention_heads, 1)]
    each = zip(of_each_layer(config, "num_attention_heads"), of_each_layer(config, "num_key_value_heads"), strict=True)
    counts = [(heads, kv_heads or heads) for heads, kv_heads in each]
    layers = [(kind in _NOT_FULL, heads) for kind, heads in zip(layer_types(config), counts, strict=True)
              if kind in ATTENTION]  # fmt: skip
    return list(dict.fromkeys(heads for _, heads in sorted(layers, key=lambda layer: layer[0])))


def _check_alike(config: Any) -> None:
    for name in HEADS:
        both = zip(of_each_layer(config, name), layer_types(config), strict=True)
        values = [value for value, kind in both if kind in ATTENTION and kind not in _NOT_FULL]
        if len(set(values)) > 1:
            raise ValueError(
                f"{config.model_type} has layers with full attention that differ in {name} "
                f"({', '.join(map(str, values))}), which a D2OCache does not support: {INSTEAD}"
            )


def shape_of(model_config: Any) -> ModelShape:
    """The shape of the decoder.

    Raises:
        ValueError: encoder-decoder models, or layers of an unsupported kind, or with full attention and heads that
            differ.
    """
    config = text_config(model_config)
    (heads, kv_heads), *others = layer_heads(config)
    return ModelShape(
        windows=tuple(layer_windows(config)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        other_heads=tuple(others),
        head_dim=_head_dim(config, heads),
        latent=latent_dim(config),
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


def _head_dim(config: Any, heads: int) -> int:
    """Of a key, the largest; of latent attention all that is cached."""
    if (latent := latent_dim(config)) is not None:
        return latent + config.qk_rope_head_dim
    return max(dim or config.hidden_size // heads for dim in of_layers(config, "head_dim"))
